"""A task from the user's own data: rows to train on, and rows held out from training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from localrl.errors import ConfigError, DataError
from localrl.records import Example
from localrl.tasks.base import RewardSpec
from localrl.tasks.rows import (
    ReadRow,
    parse_columns,
    prompt_hash,
    read_examples,
    to_example,
    with_all_columns,
)
from localrl.tasks.sources import find_source
from localrl.tasks.tables import Rows, read_rows

HELD_OUT_OF = 8

HoldOut = Literal["some", "none", "all"]
"""Which rows are held out from training: some of them; none, so that one problem is enough; or all,
as only an evaluation can use them."""


class OnePrompt(DataError):
    """The data have too few different prompts to hold any out."""


@dataclass(frozen=True)
class FileTask:
    """Examples read from files; satisfies `tasks.base.Task`."""

    name: str
    description: str
    rewards: tuple[RewardSpec, ...]
    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    environment: None = None
    """Always None: data files define no environment, but the settings may."""

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.training)

    def train(self, index: int) -> Example:
        """Training example `index`."""
        return self.training[index]

    def evaluation(self, n: int) -> list[Example]:
        """The first `n` held-out examples in the order of a hash, or all if there are fewer."""
        return list(self.held_out[:n])


def load_file_task(
    name: str | Path,
    rewards: Sequence[RewardSpec],
    *,
    train_prompts: int = 0,
    system: str | None = None,
    columns: Sequence[str] = (),
    hold_out: HoldOut = "some",
    read: ReadRow = to_example,
) -> FileTask:
    """Load the task of a file, a folder or a data set in the Hub's cache; see `find_source`.

    Trains on `train_prompts` rows, 0 for all. If the source has no held-out table, a row is held
    out if the SHA-256 of its prompt is divisible by 8, or else the one with the smallest hash: the
    same rows whatever the order in the file, and equal prompts on the same side.

    columns: columns to take under other names, see `rows.parse_columns`. hold_out: "none" leaves
    out a held-out table, "all" takes that table alone if there is one. read: converts a row.

    Raises: ConfigError if there is no such source, or it has fewer rows than asked for; DataError
    for unusable rows, or for a prompt that is in both the training and the held-out table;
    OnePrompt for fewer than two different prompts, if some are to be held out.
    """
    source, renames = find_source(str(name)), parse_columns(columns)
    whole = source.held_out if hold_out == "all" and source.held_out else source.train
    if hold_out != "some" or not source.held_out:
        return make_file_task(
            source.name,
            str(name),
            rewards,
            _rows(whole, renames),
            train_prompts,
            system=system,
            columns=columns,
            hold_out=hold_out,
            read=read,
        )
    rows = _rows(source.train, renames)
    training = read_examples(rows, system, renames, read)
    held_out = read_examples(_rows(source.held_out, renames), system, renames, read)
    _check_overlap(training, held_out, source.held_out[0])
    if not training or not held_out:
        empty = source.held_out[0] if training else source.train[0]
        raise DataError(f"{empty} has no rows; training and evaluation need one each.")
    about = f"held out: {len(held_out)}, {source.held_out[0].name}"
    return _task(source.name, str(name), rewards, training, held_out, train_prompts, about)


def make_file_task(
    name: str,
    source: str,
    rewards: Sequence[RewardSpec],
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    train_prompts: int,
    *,
    system: str | None,
    columns: Sequence[str] = (),
    hold_out: HoldOut = "some",
    read: ReadRow = to_example,
) -> FileTask:
    """Make a task from rows of one source, holding some of them out. See `load_file_task`."""
    examples = read_examples(rows, system, parse_columns(columns), read)
    if not examples:
        raise DataError(f"{source} has 0 rows: there is nothing to train on, or to measure.")
    if hold_out == "none":
        return _task(name, source, rewards, examples, [], train_prompts, "none held out")
    if hold_out == "all":
        return _task(name, source, rewards, examples, examples, 0, "all measured")
    training, held_out = split(examples)
    if not training:
        rows_there = f"{len(examples)} rows" if len(examples) > 1 else "1 row"
        raise OnePrompt(
            f"{source} has {rows_there} with 1 different prompt; training and evaluation need one "
            "each. To train on it and hold nothing out, set task.eval_prompts=0."
        )
    about = f"held out: {len(held_out)}, one row in eight, by a hash of its prompt"
    return _task(name, source, rewards, training, held_out, train_prompts, about)


def _rows(files: Sequence[Path], renames: Mapping[str, str]) -> Rows:
    """Yield the rows of all files, without columns that are neither kept nor taken."""
    without = {name for name, column in renames.items() if not column} - {*renames.values()}
    return chain.from_iterable(read_rows(file, without) for file in files)


def _task(
    name: str,
    source: str,
    rewards: Sequence[RewardSpec],
    training: Sequence[Example],
    held_out: Sequence[Example],
    train_prompts: int,
    about: str,
) -> FileTask:
    if train_prompts > len(training):
        raise ConfigError(
            f"task.train_prompts is {train_prompts}, but {source} has {len(training)} rows to "
            "train on. Lower it, or leave it out to use all."
        )
    training, held_out = with_all_columns(training, held_out), with_all_columns(held_out, training)
    used = tuple(training[:train_prompts] if train_prompts else training)
    return FileTask(
        name=name,
        description=f"{len(used)} prompts from {source}; {about}",
        rewards=tuple(rewards),
        training=used,
        held_out=tuple(sorted(held_out, key=_hash)),
    )


def without(task: FileTask, places: Collection[str]) -> FileTask:
    """Return the task without the rows at these places, whose prompts are too long.

    Raises: DataError if none is left to train on.
    """
    training = tuple(example for example in task.training if example.place not in places)
    if task.training and not training:
        raise DataError(
            f"task.filter_overlong_prompts leaves out all {len(task.training)} rows of "
            f"{task.name}. Raise rollout.max_prompt_tokens."
        )
    held_out = tuple(example for example in task.held_out if example.place not in places)
    description = f"{task.description}; {len(places)} of these left out as too long"
    return replace(task, training=training, held_out=held_out, description=description)


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples; see `load_file_task` for the rule."""
    hashes = [_hash(example) for example in examples]
    chosen = {h for h in hashes if int(h, 16) % HELD_OUT_OF == 0}
    if not chosen or len(chosen) == len(set(hashes)):
        chosen = {min(hashes)} if hashes else set()
    pairs = list(zip(examples, hashes, strict=True))
    return [e for e, h in pairs if h not in chosen], [e for e, h in pairs if h in chosen]


def _hash(example: Example) -> str:
    return prompt_hash(example.messages)


def _check_overlap(training: Sequence[Example], held_out: Sequence[Example], file: Path) -> None:
    known = {_hash(example) for example in training}
    both = [example for example in held_out if _hash(example) in known]
    if both:
        raise DataError(
            f"{len(both)} of {len(held_out)} prompts in {file} are also trained on; the first "
            f"is {both[0].id!r}. Remove them from one of the files, or train on one file alone: "
            "evaluating on prompts that were trained on proves nothing."
        )
