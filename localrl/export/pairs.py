"""Preferences in a run's stored rollouts: the best and the worst completion of each group.

Lines are in the conversational form of TRL's preference data sets: `prompt`, `chosen` and
`rejected` are lists of chat messages. `score_chosen` and `score_rejected` are the rewards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.errors import CheckpointError, ConfigError, DataError
from localrl.runs.logs import to_json
from localrl.runs.stored_groups import ROLLOUTS, stored_groups


@dataclass(frozen=True)
class WrittenPairs:
    """A file of pairs, and how many groups they come from."""

    path: Path
    pairs: int
    groups: int
    """Number of stored groups."""


def export_pairs(run: Path, out: Path) -> WrittenPairs:
    """Write one pair for each stored group of a run whose rewards differ, all at once.

    Raises: ConfigError if the run has no rollouts or `out` exists; DataError if a line of the
    rollouts cannot be read or no group gives a pair; CheckpointError if `out` cannot be written.
    """
    source = run / ROLLOUTS
    if not source.is_file():
        raise ConfigError(
            f"There are no rollouts in {run} (no {ROLLOUTS}). Name the folder of a run that has "
            "trained at least one step."
        )
    if out.exists():
        raise ConfigError(f"{out} already exists. Name another file after --pairs.")
    groups = pairs = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            fresh = Path(place) / "pairs.jsonl"
            with fresh.open("wb") as file:
                for record in stored_groups(source):
                    groups += 1
                    pair = pair_of(record)
                    if pair is not None:
                        pairs += 1
                        file.write(to_json(pair) + b"\n")
            if pairs:
                fresh.replace(out)
    except OSError as error:
        raise CheckpointError(f"The pairs cannot be written to {out}: {error}.") from error
    if not pairs:
        raise DataError(
            f"None of {groups} groups in {source} has two completions with different rewards, so "
            "there is no pair to write. Train longer, or on problems that are solved now and then."
        )
    return WrittenPairs(out, pairs, groups)


def pair_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the pair of a group in the form of rollouts.jsonl.

    None if fewer than two completions have rewards, all rewards are equal, or the best and the
    worst completion are the same text.
    """
    rewarded = [leaf for leaf in record["leaves"] if leaf["reward"] is not None]
    if not rewarded:
        return None
    best = max(rewarded, key=lambda leaf: leaf["reward"])
    worst = min(rewarded, key=lambda leaf: leaf["reward"])
    chosen, rejected = _completion(best), _completion(worst)
    if best["reward"] == worst["reward"] or chosen == rejected:
        return None
    return {
        "prompt": record["messages"],
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": best["reward"],
        "score_rejected": worst["reward"],
        "example": record["example"],
        "step": record["step"],
    }


def _completion(leaf: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return a completion as chat messages: the whole conversation where there is one."""
    return leaf.get("messages") or [{"role": "assistant", "content": leaf["text"]}]
