"""Selects training examples and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil

import numpy as np

from localrl.records import Example
from localrl.tasks.base import Task
from localrl.utils.rng import keyed_generator

POOL = 4096
"""Maximum number of examples of a finite set that are compared at once."""
ENDLESS = 4
"""Number of examples of an endless task that are compared for each one taken."""


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


def choose(
    task: Task,
    step: int,
    count: int,
    seed: int,
    *,
    uniform_share: float,
    worth: Callable[[Sequence[Example]], np.ndarray],
) -> list[Example]:
    """Choose the examples of a step: some in turn, and the most worthwhile of the others.

    `worth` gives each candidate a number, (n,). The candidates are all examples of a finite set
    (a fresh random `POOL` of them if it is larger), or the next few of an endless one. The share
    in turn walks through the shuffled set, so that no prompt is ever lost: each comes at least
    once in any 2 / share epochs, an epoch being as many draws as there are prompts.
    """
    turns = ceil(uniform_share * count - 1e-9)  # 0.07 * 100 is a little above 7
    if task.train_size:
        chosen = take(task, (step - 1) * turns, turns, seed)
        candidates = _candidates(task, step, seed)
    else:
        drawn = take(task, (step - 1) * ENDLESS * count, ENDLESS * count, seed)
        chosen, candidates = drawn[:turns], drawn[turns:]
    # By id: an endless set may repeat itself.
    taken = {example.id: example for example in chosen}
    others = list({e.id: e for e in candidates if e.id not in taken}.values())
    best = np.argsort(-worth(others), kind="stable")[: count - len(taken)]
    return [*taken.values(), *(others[i] for i in best)]


def _candidates(task: Task, step: int, seed: int) -> list[Example]:
    if task.train_size <= POOL:
        return [task.train(i) for i in range(task.train_size)]
    places = keyed_generator(seed, step, "pool").choice(task.train_size, POOL, replace=False)
    return [task.train(int(i)) for i in places]


def _index(position: int, size: int, seed: int) -> int:
    epoch, place = divmod(position, size)
    return int(_shuffled(size, seed, epoch)[place])


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "big"))).permutation(size)
