"""The least time that a token can take on this CPU: for reading weights, and for multiplying them.

Every weight is read once for all rows, and multiplied with each. A decode step takes at least the
longer of the two, at the rates that this machine reaches when it does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from localrl.engines.cpu.math import matmul
from localrl.policy.model import Policy

MATRIX = (32768, 1024)
"""Size of the matrix that is read: 128 MiB, too large for any cache."""
SIDE = 1536
"""Side of the square matrices that are multiplied."""
FEW = 32
"""Number of columns of a product as small as in decoding."""
TRIES = 5


@dataclass(frozen=True)
class Rates:
    """Rates of all CPU threads together."""

    bytes_per_s: float
    """Rate of reading memory, in a product of a matrix and a vector."""
    flops_per_s: float
    """Rate of a product of large matrices in float32, or of one with few columns."""


@dataclass(frozen=True)
class Needed:
    """The least work for a token of one row."""

    bytes: int
    flops: int

    def floor_s(self, rates: Rates, rows: int) -> float:
        """Return the least seconds of a step of this many rows."""
        return max(self.bytes / rates.bytes_per_s, rows * self.flops / rates.flops_per_s)


def measure_rates() -> Rates:
    """Return the best of a few tries, which take about a second in all."""
    matrix, vector = np.ones(MATRIX, np.float32), np.ones((MATRIX[1], 1), np.float32)
    square = np.ones((SIDE, SIDE), np.float32)
    few = square[:, :FEW].copy()
    read_s = _least(lambda: matmul(matrix, vector))
    products_s = min(
        _least(lambda: matmul(square, square)) / SIDE, _least(lambda: matmul(square, few)) / FEW
    )
    return Rates(matrix.nbytes / read_s, 2 * SIDE**2 / products_s)


def needed(policy: Policy) -> Needed | None:
    """Return the least work for a token of this model; None if its engine does not report it."""
    numbers = policy.engine.decode_numbers()
    return None if numbers is None else Needed(4 * numbers, 2 * numbers)


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
