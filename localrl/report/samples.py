"""Groups for readers: their outcomes, a choice of which to show, and their tokens in short form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from localrl.report.curves import mean
from localrl.report.growing import GroupIndex
from localrl.report.reading import read_groups_at
from localrl.runs.logs import to_json

MOST_TOKENS = 3000
"""Most tokens of a node shown in a report."""
MOST_TEXT = 20_000
"""Most characters of a message shown in a report."""
MOST_OF_LAST = 256
"""Most groups of the last step among which the best and the worst are looked for."""

Group = Mapping[str, Any]


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


class GroupSampler:
    """Chooses groups of a run for a report, again and again while it goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = GroupIndex(path)
        self._short: dict[int, tuple[dict[str, Any], int]] = {}
        """Groups of the last choice with their bytes of JSON, by offset: most are chosen again."""

    def sample(self, budget: int) -> ReportGroups:
        """Choose groups whose JSON fits into `budget` bytes.

        The last step's best, median and worst group come first, then groups spread evenly over the
        run.
        """
        cuts, offsets = self._index.cuts, self._index.read().offsets
        if self._index.cuts > cuts:
            self._short = {}
        chosen: dict[int, tuple[dict[str, Any], int]] = {}
        left = budget
        for place in chain(_telling(self._path, offsets), _spread(len(offsets))):
            if offsets[place] in chosen:
                continue
            known = self._short_group(offsets[place])
            if known is not None and known[1] <= left:
                chosen[offsets[place]] = known
                left -= known[1]
            elif left < budget / 20:
                break
        self._short = chosen
        groups = tuple(chosen[offset][0] for offset in sorted(chosen))
        has_pieces = all("t" in node for node in _nodes(groups))
        reasons = dict(self._index.reasons.most_common())
        return ReportGroups(groups, len(offsets), reasons, has_pieces)

    def _short_group(self, offset: int) -> tuple[dict[str, Any], int] | None:
        """Return a group in short form with its bytes of JSON; None if it no longer exists."""
        if offset in self._short:
            return self._short[offset]
        record = next(read_groups_at(self._path, [offset]))
        if record is None:
            return None
        group = short(record) | {"o": offset}
        return group, len(markup_free(group).encode()) + 2


def sample(path: Path, budget: int) -> ReportGroups:
    """Choose groups of a run whose JSON fits into `budget` bytes, see `GroupSampler`."""
    return GroupSampler(path).sample(budget)


def short(record: Group) -> dict[str, Any]:
    """Convert a line of rollouts.jsonl for the page: short names, three digits.

    A group also has o (its offset in the file), added by `GroupSampler`.

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


def _telling(path: Path, offsets: Sequence[int]) -> list[int]:
    """Return the places of the best, a typical and the worst group of the last step."""
    last: list[Group] = []
    for record in read_groups_at(path, offsets[: -MOST_OF_LAST - 1 : -1]):
        if record is None or (last and record.get("step") != last[0].get("step")):
            break
        last.append(record)
    rewards = [mean([leaf.get("reward") for leaf in record["leaves"]]) for record in last]
    return [len(offsets) - 1 - i for _, i in best_middle_worst(rewards)]


def _spread(count: int) -> Iterator[int]:
    """Yield the numbers below `count` in an order whose every prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    turned = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return (i for i in turned if i < count)


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
