"""What each rank has done of a step, and the same for all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localrl.rewards.logs import Logs

RankStats = Mapping[str, Any]
"""Plain data, to be sent to rank 0.

    counts      what has been spent, by metric
    failures    reward calls since the start that left a completion without a reward
    tools       calls of tools, and how many of them failed; None where there are none
    metrics, rows   what rewards have logged, as in `Logs`
    tokens      sampled on this rank
    waited_s, busy_s    seconds of the step in which it waited for the others, and the rest
"""


def counts(stats: Sequence[RankStats]) -> dict[str, float]:
    """What all have spent together."""
    return {name: sum(s["counts"][name] for s in stats) for name in stats[0]["counts"]}


def logs(stats: Sequence[RankStats]) -> Logs:
    """What the rewards of all have logged."""
    metrics: dict[str, list[float]] = {}
    for stat in stats:
        for name, values in stat["metrics"].items():
            metrics.setdefault(name, []).extend(values)
    return Logs(metrics, {row: found for stat in stats for row, found in stat["rows"].items()})


def tools(stats: Sequence[RankStats], completions: int) -> dict[str, float | None]:
    """How often tools were called, and failed; nothing where there are none."""
    told = [stat["tools"] for stat in stats if stat["tools"] is not None]
    if not told:
        return {}
    calls, failures = (sum(numbers) for numbers in zip(*told, strict=True))
    return {
        "tools/call_frequency": calls / completions,
        "tools/failure_frequency": failures / calls if calls else None,
    }


def rates(stats: Sequence[RankStats]) -> dict[str, float]:
    """What each of several ranks did, and how fast it was when it did not wait."""
    if len(stats) == 1:
        return {}
    found: dict[str, float] = {}
    for rank, stat in enumerate(stats):
        found[f"ranks/{rank}/tokens"] = stat["tokens"]
        found[f"ranks/{rank}/tokens_per_s"] = stat["tokens"] / stat["busy_s"]
        found[f"ranks/{rank}/waited_s"] = stat["waited_s"]
    return found
