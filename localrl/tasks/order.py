"""The order in which training examples come."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from localrl.records import Example
from localrl.tasks.base import Task


def take(task: Task, cursor: int, count: int, seed: int) -> list[Example]:
    """The `count` examples from position `cursor` on.

    A finite set is shuffled anew in every epoch, by seed and epoch alone; an endless one comes in
    its own order, in which `seed` picks the place to start.
    """
    if task.train_size == 0:
        start = seed * 1_000_003  # far apart: runs of different seeds see different problems
        return [task.train(start + cursor + i) for i in range(count)]
    return [task.train(_index(cursor + i, task.train_size, seed)) for i in range(count)]


def _index(position: int, size: int, seed: int) -> int:
    epoch, place = divmod(position, size)
    return int(_shuffled(size, seed, epoch)[place])


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "big"))).permutation(size)
