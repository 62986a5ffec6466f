"""A run's own successful completions, as tokens: what rejection sampling trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localrl.errors import ConfigError, DataError
from localrl.policy.conversation import EncodedConversation
from localrl.records import Example
from localrl.runs.stored_groups import ROLLOUTS, stored_groups

CUT = "cut off for length or repetition"
DECIDED = "ended early by task.decided, without their end"
UNWRITTEN = "without a token of the model"
UNFINISHED = {"length": CUT, "loop": CUT, "decided": DECIDED}
"""Reasons of an end after which a completion is not whole, in words."""
PASSES = 1 - 1e-9
"""Value of the first reward function from which on a completion is right, as in evaluations."""


@dataclass(frozen=True)
class Successes:
    """The different successful completions of a run, and where they come from."""

    examples: tuple[Example, ...]
    """Their prompts; each has an id of its own."""
    written: Mapping[str, EncodedConversation]
    """Their tokens, by the ids of the examples."""
    texts: Mapping[str, tuple[Mapping[str, Any], ...]]
    """The completions as chat messages, by the same ids."""
    groups: int
    completions: int
    successful: int
    """Number of those that passed, also those that are left out."""
    left_out: Mapping[str, int]
    """Number of those that are left out, by the reason in words."""

    def __str__(self) -> str:
        """Say how many there are, and of what."""
        prompts = len({str(example.messages) for example in self.examples})
        return (
            f"{self.successful} of {self.completions} completions in {self.groups} groups are "
            f"successful{_told(self.left_out)}; {len(self.examples)} different conversations, of "
            f"{prompts} prompts"
        )


def is_run(path: Path) -> bool:
    """True if a folder is a run's."""
    return (path / "run.json").is_file()


def read_successes(run: Path) -> Successes:
    """Read the completions that got 1 or more from the run's first reward function.

    Those that are not whole, or have no token of the model, are left out and counted. Equal ones
    are taken once. Each sequence of an agent's completion is a conversation of its own.

    Raises: ConfigError if the run has no rollouts; DataError if they cannot be read, or no
    completion is left.
    """
    source = run / ROLLOUTS
    if not source.is_file():
        raise ConfigError(
            f"There are no rollouts in {run} (no {ROLLOUTS}). Name a run that has trained at least "
            "one step."
        )
    groups = completions = successful = 0
    left_out: Counter[str] = Counter()
    known: dict[tuple[tuple[int, ...], bytes], Example] = {}
    written: dict[str, EncodedConversation] = {}
    texts: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for record in stored_groups(source):
        right = [leaf for leaf in record["leaves"] if _passed(leaf)]
        groups, completions = groups + 1, completions + len(record["leaves"])
        successful += len(right)
        for leaf in right:
            conversations = _conversations(source, record, leaf)
            if isinstance(conversations, str):
                left_out[conversations] += 1
                continue
            for one in conversations:
                key = (one.prompt_ids, one.token_ids.tobytes())
                if key not in known:
                    example = known[key] = _example(record, len(known) + 1)
                    written[example.id], texts[example.id] = one, _messages(leaf)
    if not known:
        raise DataError(
            f"No completion in {source} is successful and whole: {successful} of {completions} "
            f"passed{_told(left_out)}. Learn from worked examples instead (localrl sft DATA), or "
            "from a run on easier problems."
        )
    return Successes(
        tuple(known.values()), written, texts, groups, completions, successful, left_out
    )


def _told(left_out: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} {why}" for why, count in left_out.items())
    return f", left out of these: {counts}" if counts else ""


def _passed(leaf: Mapping[str, Any]) -> bool:
    parts = leaf.get("parts") or {"reward": leaf.get("reward")}
    first = next(iter(parts.values()))
    return first is not None and first >= PASSES


def _conversations(
    source: Path, record: Mapping[str, Any], leaf: Mapping[str, Any]
) -> list[EncodedConversation] | str:
    """Return the sequences of a stored completion, or else the reason why it is left out."""
    if why := UNFINISHED.get(leaf["finish_reason"]):
        return why
    ends = (leaf["node"], *leaf.get("beside", ()))
    each = (_written(source, record, end) for end in ends)
    return [one for one in each if one.by_model.any()] or UNWRITTEN


def _written(source: Path, record: Mapping[str, Any], end: int) -> EncodedConversation:
    """Return the tokens up to a stored node's last one of the model, as they were sampled."""
    if not record.get("prompt_ids"):
        raise DataError(
            f"{source} lacks the tokens of its prompts: an earlier version of localrl wrote "
            "it. Train the run again with this one."
        )
    nodes = [record["nodes"][n] for n in _path(record["nodes"], end)]
    ids = [token for node in nodes for token in node["token_ids"]]
    sampled = [s for node in nodes for s in node.get("sampled") or [True] * len(node["token_ids"])]
    last = max((at for at, by_model in enumerate(sampled) if by_model), default=-1)
    return EncodedConversation(
        tuple(record["prompt_ids"]),
        np.array(ids[: last + 1], np.int32),
        np.array(sampled[: last + 1], bool),
    )


def _path(nodes: list[Mapping[str, Any]], end: int) -> Iterator[int]:
    path = []
    while end >= 0:
        path.append(end)
        end = nodes[end]["parent"]
    return reversed(path)


def _example(record: Mapping[str, Any], number: int) -> Example:
    place = f"group of {record['example']} in step {record['step']}"
    return Example(f"{record['example']}-{number}", tuple(record["messages"]), place=place)


def _messages(leaf: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    said = leaf.get("messages") or [{"role": "assistant", "content": leaf["text"]}]
    return tuple(said)
