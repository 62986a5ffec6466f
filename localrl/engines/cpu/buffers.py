"""A pool of float32 buffers allocated from MLX, so that they are counted and reused.

Each layer's arrays have the same sizes as the previous layer's. Buffers are kept for the duration
of a pass, and one that is no longer referenced is reused for the next array of its size; MLX, which
cannot allocate without filling, is only asked when none is free.
"""

from __future__ import annotations

import math
from sys import getrefcount
from threading import Lock

import numpy as np

from localrl.backend import mx

LARGE = 1 << 12
"""Minimum number of elements of an array that is allocated from MLX."""

SPARE = 16 << 20
"""Maximum bytes of free buffers when MLX is asked for more, so they hardly add to the peak."""

FEW = 64
"""Maximum columns, one per decoded row, that are left to NumPy: a decoding step is short."""


def _free(buffers: list[np.ndarray]) -> list[int]:
    """Indices of the buffers that no array references."""
    return [place for place, buffer in enumerate(buffers) if getrefcount(buffer) == UNUSED]


def _first_free(buffers: list[np.ndarray]) -> int | None:
    """Index of the first free buffer; inlined, because a pass calls this thousands of times."""
    for place, buffer in enumerate(buffers):
        if getrefcount(buffer) == UNUSED:
            return place
    return None


def _unused() -> int:
    """Reference count, in such a loop, of a buffer in a list that no array references."""
    return next(getrefcount(buffer) for _, buffer in enumerate([np.empty(1), np.empty(1)]))


UNUSED = _unused()


class BufferPool:
    """The buffers of one pass, by number of elements."""

    def __init__(self) -> None:
        self._all: dict[int, list[np.ndarray]] = {}
        self._lock = Lock()
        self._grown = 0
        """Bytes allocated since the last search for free buffers, which takes as long as a norm."""

    def lend(self, count: int) -> np.ndarray:
        """An uninitialised buffer of `count` elements; reused once its last view is dropped."""
        with self._lock:
            mine = self._all.get(count, [])
            if (place := _first_free(mine)) is not None:
                return mine[place][:]
            self._grown += 4 * count
            if self._grown >= SPARE // 4:
                self._trim()
                self._grown = 0
            # Copying uninitialised memory takes MLX a tenth of the time of an operation that fills.
            new = np.array(mx.array(np.empty(count, np.float32)), copy=False)
            self._all.setdefault(count, []).append(new)
            return new[:]

    def _trim(self) -> None:
        """Return free buffers beyond `SPARE` to MLX."""
        free = {size: _free(buffers) for size, buffers in self._all.items()}
        total = sum(4 * size * len(places) for size, places in free.items())
        while total > SPARE:
            # First those larger than SPARE, then those of the size with the most free buffers: of
            # other sizes all may be needed again.
            size = max(
                free, key=lambda size: (4 * size > SPARE and bool(free[size]), len(free[size]))
            )
            self._all[size].pop(free[size].pop())
            total -= 4 * size


_pool = BufferPool()


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate an uninitialised array."""
    count = math.prod(shape)
    return np.empty(shape, np.float32) if count < LARGE else _pool.lend(count).reshape(shape)


def persistent_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate zeros outside the pool, for many steps: MLX gets the memory back when they go."""
    return np.array(mx.zeros(shape), copy=False)


def release_all() -> None:
    """Drop all buffers at the end of a pass; each is freed with the last array that uses it."""
    global _pool
    _pool = BufferPool()


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate zeros from the pool."""
    found = empty(shape)
    found[...] = 0
    return found


def empty_columns(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate uninitialised columns; a few, being short-lived, are left to NumPy."""
    return np.empty(shape, np.float32) if shape[-1] <= FEW else empty(shape)


def empty_like(x: np.ndarray) -> np.ndarray:
    """Allocate uninitialised columns in the shape of x."""
    return empty_columns(x.shape)
