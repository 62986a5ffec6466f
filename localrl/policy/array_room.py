"""Where large arrays lie: in MLX's memory, where they are counted, and where they are used again.

A layer's arrays have the sizes of the one before. A buffer that nobody looks at any more is given
to the next one of its size; MLX, which can't give memory that it does not fill, is asked for the
first only.
"""

from __future__ import annotations

import math

import numpy as np

from localrl.backend import mx

LARGE = 1 << 12
"""Numbers from which on an array is laid into MLX's memory."""

SPARE = 16 << 20
"""Bytes that may be free, so that they hardly add to the peak; more go back to MLX."""

FEW = 64
"""Columns, one for each row that is decoded, up to which it is not: a step is soon over."""


class _Buffers:
    """Free buffers of one pass by how many numbers they hold."""

    def __init__(self) -> None:
        self.free: dict[int, list[np.ndarray]] = {}
        self.bytes = 0
        self.over = False

    def take(self, count: int) -> np.ndarray:
        """One of this size, with anything in it."""
        found = self.free.get(count)
        if found:
            self.bytes -= 4 * count
            if len(found) == 1:
                del self.free[count]
            return found.pop()
        # A copy of nothing takes MLX a tenth of the time of an operation that fills.
        return np.array(mx.array(np.empty(count, np.float32)), copy=False)

    def give(self, buffer: np.ndarray) -> None:
        """It is free."""
        if self.over:
            return
        self.free.setdefault(buffer.size, []).append(buffer)
        self.bytes += buffer.nbytes
        while self.bytes > SPARE:
            self._let_go_of_one()

    def _let_go_of_one(self) -> None:
        """Of the size of which there are most: some of the others may be needed sooner."""
        size = max(self.free, key=lambda size: len(self.free[size]))
        self.bytes -= self.free[size].pop().nbytes
        if not self.free[size]:
            del self.free[size]


_buffers = _Buffers()


class _Loan:
    """Owner of a buffer in NumPy's eyes: it goes when the last array that looks at it does."""

    __slots__ = ("__array_interface__", "_buffer", "_buffers")

    def __init__(self, buffers: _Buffers, count: int) -> None:
        self._buffers, self._buffer = buffers, buffers.take(count)
        self.__array_interface__ = self._buffer.__array_interface__

    def __del__(self) -> None:
        self._buffers.give(self._buffer)


def room(shape: tuple[int, ...]) -> np.ndarray:
    """An array to be written."""
    count = math.prod(shape)
    if count < LARGE:
        return np.empty(shape, np.float32)
    return np.asarray(_Loan(_buffers, count)).reshape(shape)


def lasting(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that will stay for many steps: MLX gets their memory as soon as they go."""
    return np.array(mx.zeros(shape), copy=False)


def give_back() -> None:
    """Give all free buffers back to MLX, for a pass is over; so go those that are still in use."""
    global _buffers
    _buffers.over = True
    _buffers.free.clear()
    _buffers = _Buffers()


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, in such room."""
    found = room(shape)
    found[...] = 0
    return found


def columns(shape: tuple[int, ...]) -> np.ndarray:
    """Room for columns; few of them are soon done with, and left to NumPy."""
    return np.empty(shape, np.float32) if shape[-1] <= FEW else room(shape)


def like(x: np.ndarray) -> np.ndarray:
    """Room for as many columns."""
    return columns(x.shape)
