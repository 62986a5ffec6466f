"""Confidence intervals of measured shares, and tests for their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Quantile of a 95 % interval."""
FLIPS = 10_000
"""Number of random sign flips in a paired test."""


def wilson(passed: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), in 0..1."""
    z = Z
    share = passed / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Return the unbiased probability that one of k <= n completions passes, if `passed` of n did.

    Chen et al. 2021, arXiv 2107.03374.
    """
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def share_interval(values: Sequence[float], samples: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean over prompts of shares of `samples` completions each.

    Wilson's, with the equivalent number of independent completions: derived from the spread between
    prompts, at least one and at most `samples` for each prompt. For single completions it is the
    plain Wilson interval.
    """
    prompts, share = len(values), float(np.mean(values))
    square = float(np.var(values, ddof=1)) if prompts > 1 else 0.0
    sure = prompts * share * (1 - share) / square if square > 0 else prompts
    n = min(max(sure, prompts), prompts * samples)
    return wilson(share * n, n)


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the second minus the first share on the same n prompts.

    Agresti and Min 2005: adds half a prompt to each of the four cells, then uses the normal one.
    """
    total, difference = n + 2, only_second - only_first
    variance = only_first + only_second + 1 - difference**2 / total
    return _around(difference / total, math.sqrt(variance) / total)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p that both sides are equally likely to pass alone.

    McNemar 1947, with the binomial instead of its limit; 1 if they never differ.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def mean_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % normal interval of a mean difference; None for fewer than two."""
    if len(differences) < 2:
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return _around(float(np.mean(differences)), error)


def sign_flip(differences: Sequence[float], seed: int) -> float:
    """Return the two-sided p of a mean difference of 0, if the sign of each difference were random.

    From `FLIPS` random flips, with the observed one counted, so never below 1 / (FLIPS + 1).
    """
    values = np.array([d for d in differences if d != 0])
    draws, extreme = np.random.default_rng(seed), 0
    bound = abs(values.sum()) - 1e-9
    for _ in range(FLIPS // 100):
        signs = draws.integers(0, 2, (100, len(values))) * 2 - 1
        extreme += int((np.abs(signs @ values) >= bound).sum())
    return (extreme + 1) / (FLIPS + 1)


def _around(middle: float, error: float) -> tuple[float, float]:
    return max(-1.0, middle - Z * error), min(1.0, middle + Z * error)
