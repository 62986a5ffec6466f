"""Groups for people: what became of each, which of them to show, and their tokens in short."""

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
"""Tokens of a node that a report shows."""
MOST_TEXT = 20_000
"""Characters of a message that a report shows."""
KEPT = "learned from"

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A group in short: enough to choose from, wherever its tokens are."""

    offset: int
    """Byte of rollouts.jsonl at which it begins."""
    step: int
    reward: float | None
    """Mean over its completions that have one."""
    kept: bool
    reason: str | None


@dataclass(frozen=True)
class Sampled:
    """Groups of a run that fit into a report."""

    groups: tuple[dict[str, Any], ...]
    """In the order of the run, as `short` makes them."""
    total: int
    """Groups that rollouts.jsonl holds."""
    reasons: Mapping[str, int]
    """Of all groups: how many were learned from, or why they were not."""
    has_pieces: bool
    """Whether the texts of tokens are known; runs of old versions have ids alone."""


def entries(path: Path) -> list[Entry]:
    """All groups of a run in short."""
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


def sample(path: Path, budget: int) -> Sampled:
    """Groups whose JSON fits into `budget` bytes.

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
    return Sampled(groups, len(known), reasons(known), all("t" in g for g in _nodes(groups)))


def reasons(known: Sequence[Entry]) -> dict[str, int]:
    """How many groups were learned from, and how many were not for each reason."""
    whats = [KEPT if entry.kept else entry.reason or "not learned from" for entry in known]
    return dict(Counter(whats).most_common())


def short(record: Group) -> dict[str, Any]:
    """A line of rollouts.jsonl as the page takes it: short names, three digits.

    A node has p (parent), n (length), t (text of each token) or i (its id), l (surprisals),
    e (entropies), a (advantage) and, where the model did not write all, s (1 where it did); a leaf
    has n (node), r (reward), f (why it ended), q (reward by function), d (why it was not learned
    from), x (what reward functions logged) and, where the texts of tokens are not known, v (text).
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
    """JSON that no reader of HTML takes for markup, whatever texts are in it."""
    return to_json(value).decode().replace("<", "\\u003c").replace("&", "\\u0026")


def best_middle_worst(rewards: Sequence[float | None]) -> list[tuple[str, int]]:
    """Places of the best, a typical and the worst reward, as far as these differ."""
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
    """The numbers below `count` in an order of which every beginning is spread evenly."""
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
