"""The least time that a token can take on this CPU: what has to be read, and what multiplied.

Every weight is read once for all rows, and multiplied with each. A decode step takes at least the
longer of the two, at the rates that this machine has when it does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from localrl.engines.cpu.math import matmul
from localrl.policy.model import Policy

MATRIX = (32768, 1024)
"""128 MiB: no cache holds it."""
SIDE = 1536
"""Of the square matrices that are multiplied."""
FEW = 32
"""Columns of a product as decoding has them."""
TRIES = 5


@dataclass(frozen=True)
class Rates:
    """What the CPU's threads do together."""

    bytes_per_s: float
    """Read from memory, in a product of a matrix and a vector."""
    flops_per_s: float
    """Of a product of large matrices in float32, or of one with few columns."""


@dataclass(frozen=True)
class Needed:
    """What a token of one row takes at least."""

    bytes: int
    flops: int

    def floor_s(self, rates: Rates, rows: int) -> float:
        """Seconds of a step of so many rows."""
        return max(self.bytes / rates.bytes_per_s, rows * self.flops / rates.flops_per_s)


def measure_rates() -> Rates:
    """The best of a few tries, which take about a second."""
    matrix, vector = np.ones(MATRIX, np.float32), np.ones((MATRIX[1], 1), np.float32)
    square = np.ones((SIDE, SIDE), np.float32)
    few = square[:, :FEW].copy()
    read_s = _least(lambda: matmul(matrix, vector))
    products_s = min(
        _least(lambda: matmul(square, square)) / SIDE, _least(lambda: matmul(square, few)) / FEW
    )
    return Rates(matrix.nbytes / read_s, 2 * SIDE**2 / products_s)


def needed(policy: Policy) -> Needed | None:
    """What a token of this model needs; None where its engine does not say."""
    numbers = policy.engine.decode_numbers()
    return None if numbers is None else Needed(4 * numbers, 2 * numbers)


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
