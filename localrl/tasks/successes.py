"""A run's own successful completions, as tokens: what rejection sampling trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from localrl.errors import ConfigError, DataError
from localrl.policy.conversation import EncodedConversation
from localrl.records import Example
from localrl.runs.stored_groups import ROLLOUTS, stored_groups

ENDED = ("stop", "closed", "turns")
"""Reasons of an end after which a completion is whole."""
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
    cut_off: int
    """Number of those that were cut off for length or repetition."""

    def __str__(self) -> str:
        """Say how many there are, and of what."""
        prompts = len({str(example.messages) for example in self.examples})
        cut = f", {self.cut_off} of them cut off and left out" if self.cut_off else ""
        return (
            f"{self.successful} of {self.completions} completions in {self.groups} groups are "
            f"successful{cut}; {len(self.examples)} different ones, of {prompts} prompts"
        )


def is_run(path: Path) -> bool:
    """True if a folder is a run's."""
    return (path / "run.json").is_file()


def read_successes(run: Path) -> Successes:
    """Read the completions that got 1 or more from the run's first reward function.

    Those that were cut off for length or repetition are left out, and equal ones taken once.

    Raises: ConfigError if the run has no rollouts; DataError if they cannot be read, or no
    completion is left.
    """
    source = run / ROLLOUTS
    if not source.is_file():
        raise ConfigError(
            f"There are no rollouts in {run} (no {ROLLOUTS}). Name a run that has trained at least "
            "one step."
        )
    found = Successes((), {}, {}, 0, 0, 0, 0)
    known: dict[tuple[tuple[int, ...], bytes], Example] = {}
    written: dict[str, EncodedConversation] = {}
    texts: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for record in stored_groups(source):
        right = [leaf for leaf in record["leaves"] if _passed(leaf)]
        whole = [leaf for leaf in right if leaf.get("finish_reason") in ENDED]
        found = replace(
            found,
            groups=found.groups + 1,
            completions=found.completions + len(record["leaves"]),
            successful=found.successful + len(right),
            cut_off=found.cut_off + len(right) - len(whole),
        )
        for leaf in whole:
            one = _written(source, record, leaf)
            key = (one.prompt_ids, one.token_ids.tobytes())
            if key not in known:
                example = known[key] = _example(record, leaf, len(known) + 1)
                written[example.id], texts[example.id] = one, _messages(leaf)
    if not known:
        raise DataError(
            f"No completion in {source} is successful and whole: {found.successful} of "
            f"{found.completions} passed, {found.cut_off} of these were cut off. Learn from worked "
            "examples instead (localrl sft DATA), or from a run on easier problems."
        )
    return replace(found, examples=tuple(known.values()), written=written, texts=texts)


def _passed(leaf: Mapping[str, Any]) -> bool:
    parts = leaf.get("parts") or {"reward": leaf.get("reward")}
    first = next(iter(parts.values()))
    return first is not None and first >= PASSES


def _written(
    source: Path, record: Mapping[str, Any], leaf: Mapping[str, Any]
) -> EncodedConversation:
    """Return the tokens of a stored completion, as they were sampled."""
    if not record.get("prompt_ids"):
        raise DataError(
            f"{source} lacks the tokens of its prompts: an earlier version of localrl wrote "
            "it. Train the run again with this one."
        )
    nodes = [record["nodes"][n] for n in _path(record["nodes"], leaf["node"])]
    ids = [token for node in nodes for token in node["token_ids"]]
    sampled = [s for node in nodes for s in node.get("sampled") or [True] * len(node["token_ids"])]
    last = max(at for at, by_model in enumerate(sampled) if by_model)
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


def _example(record: Mapping[str, Any], leaf: Mapping[str, Any], number: int) -> Example:
    place = f"group of {record['example']} in step {record['step']}"
    return Example(f"{record['example']}-{number}", tuple(record["messages"]), place=place)


def _messages(leaf: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    said = leaf.get("messages") or [{"role": "assistant", "content": leaf["text"]}]
    return tuple(said)
