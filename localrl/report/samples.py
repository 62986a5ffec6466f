"""Groups for readers: their outcomes, a choice of which to show, and their tokens in short form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.report.curves import mean
from localrl.report.reading import read_groups, read_groups_at
from localrl.runs.logs import to_json

MOST_TOKENS = 3000
"""Most tokens of a node shown in a report."""
MOST_TEXT = 20_000
"""Most characters of a message shown in a report."""
KEPT = "learned from"

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A summary of a group: enough to choose from without reading its tokens."""

    offset: int
    """Byte offset in rollouts.jsonl."""
    step: int
    reward: float | None
    """Mean over its completions that have a reward."""
    kept: bool
    reason: str | None


@dataclass(frozen=True)
class ReportGroups:
    """Groups of a run that fit into a report."""

    groups: tuple[dict[str, Any], ...]
    """Groups in the order of the run, in the form made by `short`."""
    total: int
    """Number of groups in rollouts.jsonl."""
    reasons: Mapping[str, int]
    """Counts over all groups: those learned from, and those not learned from by reason."""
    has_pieces: bool
    """True if the texts of tokens are known; runs of old versions only have ids."""


def entries(path: Path) -> list[Entry]:
    """Return summaries of all groups of a run."""
    return [
        Entry(
            offset,
            record.get("step") or 0,
            mean([leaf.get("reward") for leaf in record["leaves"]]),
            bool(record.get("kept")),
            record.get("reason"),
        )
        for offset, record in read_groups(path)
    ]


def sample(path: Path, budget: int) -> ReportGroups:
    """Choose groups whose JSON fits into `budget` bytes.

    The last step's best, median and worst group come first, then groups spread evenly over the run.
    """
    known = entries(path)
    order = dict.fromkeys([*_telling(known), *_spread(len(known))])
    chosen: dict[int, dict[str, Any]] = {}
    left = budget
    found = read_groups_at(path, [known[i].offset for i in order]) if known else iter(())
    for index, record in zip(order, found, strict=True):
        if record is None:
            continue
        group = short(record)
        size = len(markup_free(group).encode()) + 2
        if size <= left:
            chosen[index], left = group, left - size
        elif left < budget / 20:
            break
    groups = tuple(chosen[i] for i in sorted(chosen))
    return ReportGroups(groups, len(known), reasons(known), all("t" in g for g in _nodes(groups)))


def reasons(known: Sequence[Entry]) -> dict[str, int]:
    """Count the groups that were learned from, and for each reason those that were not."""
    whats = [KEPT if entry.kept else entry.reason or "not learned from" for entry in known]
    return dict(Counter(whats).most_common())


def short(record: Group) -> dict[str, Any]:
    """Convert a line of rollouts.jsonl for the page: short names, three digits.

    A node has p (parent), n (length), t (text of each token) or i (its id), l (surprisals), e
    (entropies), a (advantage) and, if the model did not write all of it, s (1 where it did); a leaf
    has n (node), r (reward), f (finish reason), q (reward by function), d (reason why it was not
    learned from), x (values logged by reward functions) and, if the texts of tokens are not known,
    v (text).
    """
    nodes = [_short_node(node) for node in record["nodes"]]
    has_pieces = all("t" in node for node in nodes)
    return {
        "step": record.get("step"),
        "example": str(record.get("example")),
        "messages": [_message(message) for message in record["messages"]],
        "kept": bool(record.get("kept")),
        "reason": record.get("reason"),
        "replayed": bool(record.get("replayed")),
        "nodes": nodes,
        "leaves": [_short_leaf(leaf, has_pieces) for leaf in record["leaves"]],
    }


def markup_free(value: Any) -> str:
    """Return JSON that no HTML reader takes for markup, whatever text it contains."""
    return to_json(value).decode().replace("<", "\\u003c").replace("&", "\\u0026")


def best_middle_worst(rewards: Sequence[float | None]) -> list[tuple[str, int]]:
    """Return the indices of the best, a typical and the worst reward, as far as these differ."""
    order = sorted((r, i) for i, r in enumerate(rewards) if r is not None)
    if not order:
        return []
    picks = {"best": order[-1], "typical": order[len(order) // 2], "worst": order[0]}
    told: dict[str, tuple[float, int]] = {}
    for name, (reward, i) in picks.items():
        if reward not in [seen for seen, _ in told.values()]:
            told[name] = (reward, i)
    return [(name, i) for name, (_, i) in told.items()]


def _telling(known: Sequence[Entry]) -> list[int]:
    last = max((entry.step for entry in known), default=0)
    of_last = [i for i, entry in enumerate(known) if entry.step == last]
    return [of_last[i] for _, i in best_middle_worst([known[i].reward for i in of_last])]


def _spread(count: int) -> list[int]:
    """Return the numbers below `count` in an order whose every prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    turned = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in turned if i < count]


def _nodes(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [node for group in groups for node in group["nodes"]]


def _message(message: Any) -> dict[str, Any]:
    fields = message if isinstance(message, dict) else {"content": message}
    text = str(fields.get("content") or "")
    cut = f"… ({len(text) - MOST_TEXT} more characters)" if len(text) > MOST_TEXT else ""
    return {"role": str(fields.get("role", "")), "content": text[:MOST_TEXT] + cut}


def _short_node(node: Mapping[str, Any]) -> dict[str, Any]:
    ids, pieces = node.get("token_ids") or [], node.get("pieces")
    line: dict[str, Any] = {
        "p": node.get("parent", -1),
        "n": len(ids),
        "l": [_rounded(value, -1) for value in (node.get("sampled_logprobs") or [])[:MOST_TOKENS]],
        "e": [_rounded(value) for value in (node.get("entropies") or [])[:MOST_TOKENS]],
        "a": _rounded(node.get("advantage")),
    }
    line["t" if pieces is not None else "i"] = (ids if pieces is None else pieces)[:MOST_TOKENS]
    if "sampled" in node:
        line["s"] = [int(bool(value)) for value in node["sampled"][:MOST_TOKENS]]
    return line


def _short_leaf(leaf: Mapping[str, Any], has_pieces: bool) -> dict[str, Any]:
    parts = leaf.get("parts") or {}
    line = {
        "n": leaf.get("node", 0),
        "r": leaf.get("reward"),
        "f": str(leaf.get("finish_reason")),
        "q": {str(name): value for name, value in parts.items()},
    }
    if not has_pieces:
        line["v"] = str(leaf.get("text", ""))[:MOST_TEXT]
    if leaf.get("dropped"):
        line["d"] = str(leaf["dropped"])
    if leaf.get("extra"):
        line["x"] = str(leaf["extra"])[:MOST_TEXT]
    return line


def _rounded(value: Any, sign: int = 1) -> float | int | None:
    if not isinstance(value, int | float):
        return None
    number = round(sign * value, 3)
    return int(number) if number == int(number) else number
