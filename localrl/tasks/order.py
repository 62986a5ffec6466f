"""Selects training examples and their order."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from localrl.records import Example
from localrl.tasks.base import Task


def take(task: Task, cursor: int, count: int, seed: int) -> list[Example]:
    """Take `count` examples starting at position `cursor`.

    A finite set is reshuffled in every epoch, by seed and epoch alone. Across the boundary between
    two epochs, examples already taken are skipped, so none comes twice. An endless set comes in
    its own order, and `seed` picks the starting point.

    Raises: ValueError for a count above the size of a finite set.
    """
    if 0 < task.train_size < count:
        raise ValueError(f"{count} different examples are needed, but there are {task.train_size}")
    if task.train_size == 0:
        start = seed * 1_000_003  # far apart: runs of different seeds see different problems
        return [task.train(start + cursor + i) for i in range(count)]
    taken: dict[int, None] = {}
    while len(taken) < count:
        taken[_index(cursor, task.train_size, seed)] = None
        cursor += 1
    return [task.train(index) for index in taken]


def _index(position: int, size: int, seed: int) -> int:
    epoch, place = divmod(position, size)
    return int(_shuffled(size, seed, epoch)[place])


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "big"))).permutation(size)
