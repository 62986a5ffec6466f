"""Per-rank step statistics and their totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localrl.rewards.logs import Logs

RankStats = Mapping[str, Any]
"""Plain data, sent to rank 0.

    counts      amounts spent, by metric
    failures    reward calls since the start that left a completion without a reward
    tools       calls of tools, and how many of them failed; None if there are none
    metrics, rows   entries logged by rewards, as in `Logs`
    tokens      sampled on this rank
    waited_s, busy_s    seconds of the step in which it waited for the others, and the rest
"""


def counts(stats: Sequence[RankStats]) -> dict[str, float]:
    """Return the totals spent by all ranks."""
    return {name: sum(s["counts"][name] for s in stats) for name in stats[0]["counts"]}


def logs(stats: Sequence[RankStats]) -> Logs:
    """Return the entries logged by the rewards of all ranks."""
    metrics: dict[str, list[float]] = {}
    for stat in stats:
        for name, values in stat["metrics"].items():
            metrics.setdefault(name, []).extend(values)
    return Logs(metrics, {row: found for stat in stats for row, found in stat["rows"].items()})


def tools(stats: Sequence[RankStats], completions: int) -> dict[str, float | None]:
    """Return how often tools were called, and failed; empty if there are none."""
    told = [stat["tools"] for stat in stats if stat["tools"] is not None]
    if not told:
        return {}
    calls, failures = (sum(numbers) for numbers in zip(*told, strict=True))
    return {
        "tools/call_frequency": calls / completions,
        "tools/failure_frequency": failures / calls if calls else None,
    }


def rates(stats: Sequence[RankStats]) -> dict[str, float]:
    """Return tokens, speed without waiting, and waiting time per rank; empty for a single rank."""
    if len(stats) == 1:
        return {}
    found: dict[str, float] = {}
    for rank, stat in enumerate(stats):
        found[f"ranks/{rank}/tokens"] = stat["tokens"]
        found[f"ranks/{rank}/tokens_per_s"] = stat["tokens"] / stat["busy_s"]
        found[f"ranks/{rank}/waited_s"] = stat["waited_s"]
    return found
