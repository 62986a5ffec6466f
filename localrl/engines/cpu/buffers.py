"""Where large arrays lie: in MLX's memory, where they are counted, and where they are used again.

A layer's arrays have the sizes of the one before. Buffers are kept for the length of a pass, and
one that nobody looks at any more is lent to the next array of its size; MLX, which can't give
memory that it does not fill, is asked for the first only.
"""

from __future__ import annotations

import math
from sys import getrefcount
from threading import Lock

import numpy as np

from localrl.backend import mx

LARGE = 1 << 12
"""Numbers from which on an array is laid into MLX's memory."""

SPARE = 16 << 20
"""Bytes that may be free when MLX is asked for more, so that they hardly add to the peak."""

FEW = 64
"""Columns, one for each row that is decoded, up to which it is not: a step is soon over."""


def _free(buffers: list[np.ndarray]) -> list[int]:
    """Places of those that no array looks at."""
    return [place for place, buffer in enumerate(buffers) if getrefcount(buffer) == UNUSED]


def _first_free(buffers: list[np.ndarray]) -> int | None:
    """The first of them; a pass asks thousands of times, so no function is called for each."""
    for place, buffer in enumerate(buffers):
        if getrefcount(buffer) == UNUSED:
            return place
    return None


def _unused() -> int:
    """What is counted of a buffer that is in a list and that no array looks at, in such a loop."""
    return next(getrefcount(buffer) for _, buffer in enumerate([np.empty(1), np.empty(1)]))


UNUSED = _unused()


class BufferPool:
    """Those of one pass by how many numbers they hold."""

    def __init__(self) -> None:
        self._all: dict[int, list[np.ndarray]] = {}
        self._lock = Lock()
        self._grown = 0
        """Bytes asked of MLX since the last look at what is free, which takes as long as a norm."""

    def lend(self, count: int) -> np.ndarray:
        """A buffer of this size with anything in it, until nobody looks at it any more."""
        with self._lock:
            mine = self._all.get(count, [])
            if (place := _first_free(mine)) is not None:
                return mine[place][:]
            self._grown += 4 * count
            if self._grown >= SPARE // 4:
                self._trim()
                self._grown = 0
            # A copy of nothing takes MLX a tenth of the time of an operation that fills.
            new = np.array(mx.array(np.empty(count, np.float32)), copy=False)
            self._all.setdefault(count, []).append(new)
            return new[:]

    def _trim(self) -> None:
        """Give MLX back what is free beyond `SPARE`."""
        free = {size: _free(buffers) for size, buffers in self._all.items()}
        total = sum(4 * size * len(places) for size, places in free.items())
        while total > SPARE:
            # Those that will not fit first; then of the size of which there are most: of others all
            # may be needed again.
            size = max(
                free, key=lambda size: (4 * size > SPARE and bool(free[size]), len(free[size]))
            )
            self._all[size].pop(free[size].pop())
            total -= 4 * size


_pool = BufferPool()


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array to be written."""
    count = math.prod(shape)
    return np.empty(shape, np.float32) if count < LARGE else _pool.lend(count).reshape(shape)


def persistent_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that will stay for many steps: MLX gets their memory as soon as they go."""
    return np.array(mx.zeros(shape), copy=False)


def release_all() -> None:
    """Forget all buffers, for a pass is over: each goes with the last array that looks at it."""
    global _pool
    _pool = BufferPool()


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, in such room."""
    found = empty(shape)
    found[...] = 0
    return found


def empty_columns(shape: tuple[int, ...]) -> np.ndarray:
    """Room for columns; few of them are soon done with, and left to NumPy."""
    return np.empty(shape, np.float32) if shape[-1] <= FEW else empty(shape)


def empty_like(x: np.ndarray) -> np.ndarray:
    """Room for as many columns."""
    return empty_columns(x.shape)
