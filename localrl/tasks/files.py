"""A task from the user's own data: a JSONL file, or a folder with train and valid files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.records import Example
from localrl.tasks.base import RewardSpec
from localrl.tasks.rows import prompt_hash, read_examples, read_rows

HELD_OUT_OF = 8
VALID_NAMES = ("valid.jsonl", "validation.jsonl", "test.jsonl")
"""Accepted names of a folder's held-out file, as in mlx_lm and others; the first found is used."""


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
    path: Path,
    rewards: Sequence[RewardSpec],
    *,
    train_prompts: int = 0,
    system: str | None = None,
) -> FileTask:
    """Load the task of a JSONL file or folder, training on `train_prompts` rows, 0 for all.

    A folder has train.jsonl and may have valid.jsonl. Without it, and for a single file, a row is
    held out if the SHA-256 of its prompt is divisible by 8, or else the one with the smallest
    hash: the same rows whatever the order in the file, and equal prompts on the same side.

    Raises: ConfigError if there is no such file, or it has fewer rows than asked for; DataError
    for unusable rows, for fewer than two, or for a prompt that is in both the training and the
    held-out file.
    """
    train_file, valid_file = _files(path)
    rows = read_rows(train_file)
    if valid_file is None:
        return make_file_task(path, rewards, rows, train_prompts, system)
    training = read_examples(rows, system)
    held_out = read_examples(read_rows(valid_file), system)
    _check_overlap(training, held_out, valid_file)
    return _task(path, rewards, training, held_out, train_prompts, valid_file.name)


def make_file_task(
    path: Path,
    rewards: Sequence[RewardSpec],
    rows: Iterator[tuple[str, dict[str, Any]]],
    train_prompts: int,
    system: str | None,
) -> FileTask:
    """Make a task from rows of one source, holding some of them out. See `load_file_task`."""
    training, held_out = split(read_examples(rows, system))
    source = "one row in eight, by a hash of its prompt"
    return _task(path, rewards, training, held_out, train_prompts, source)


def _task(
    path: Path,
    rewards: Sequence[RewardSpec],
    training: Sequence[Example],
    held_out: Sequence[Example],
    train_prompts: int,
    source: str,
) -> FileTask:
    if not training or not held_out:
        there = len(training) + len(held_out)
        raise DataError(f"{path} has {there} rows; training and evaluation need one each.")
    if train_prompts > len(training):
        raise ConfigError(
            f"task.train_prompts is {train_prompts}, but {path} has {len(training)} rows to train "
            "on. Lower it, or leave it out to use all."
        )
    used = tuple(training[:train_prompts] if train_prompts else training)
    return FileTask(
        name=path.stem,
        description=f"{len(used)} prompts from {path}; held out: {len(held_out)}, {source}",
        rewards=tuple(rewards),
        training=used,
        held_out=tuple(sorted(held_out, key=_hash)),
    )


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


def _files(path: Path) -> tuple[Path, Path | None]:
    """The training file and the held-out file, if there is one."""
    if path.is_dir():
        train = path / "train.jsonl"
        if not train.is_file():
            raise ConfigError(f"The folder {path} has no train.jsonl to train on.")
        return train, next((path / n for n in VALID_NAMES if (path / n).is_file()), None)
    if not path.is_file():
        raise ConfigError(f"There is no file {path}. Give a .jsonl file or a folder with one.")
    return path, None


def _check_overlap(training: Sequence[Example], held_out: Sequence[Example], file: Path) -> None:
    known = {_hash(example) for example in training}
    both = [example for example in held_out if _hash(example) in known]
    if both:
        raise DataError(
            f"{len(both)} of {len(held_out)} prompts in {file} are also trained on; the first "
            f"is {both[0].id!r}. Remove them from one of the files: evaluating on prompts that "
            "were trained on proves nothing."
        )
