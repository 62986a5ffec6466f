"""How the time of a decode step depends on the rows and on the length: least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SPANS = 4
"""Parts of a completion whose times are fitted by themselves, for the effect of its length."""
LONG = 32
"""Tokens from which on the fit has a term for the length."""


@dataclass(frozen=True)
class Fit:
    """step time = a + b rows + c rows length, in ms; length in tokens, the prompt included.

    No factor is below 0.
    """

    a_ms: float
    b_ms: float
    c_ms: float | None
    """None: completions were too short to tell."""
    residual: float
    """Root mean square of what the fit is wrong by, as a share of the time."""


def fit(steps: Mapping[int, np.ndarray], prompt_tokens: int) -> Fit | None:
    """Least squares on what each span of each row count took, relative to the time.

    steps: by rows, (tokens - 1,) seconds. None when the row counts are too few.
    """
    if len(steps) < 2:
        return None
    with_length = min(map(len, steps.values())) >= LONG
    equations, times = [], []
    for rows, seconds in steps.items():
        places = np.arange(len(seconds)) + prompt_tokens + 1
        for span in np.array_split(np.arange(len(seconds)), SPANS if with_length else 1):
            equations.append([1.0, rows, *([rows * places[span].mean()] if with_length else [])])
            times.append(1e3 * seconds[span].mean())
    terms, wanted = np.array(equations), np.array(times)
    found = _no_less_than_nothing(terms / wanted[:, None])
    wrong = terms @ found / wanted - 1
    a, b = map(float, found[:2])
    return Fit(a, b, float(found[2]) if with_length else None, float(np.sqrt((wrong**2).mean())))


def _no_less_than_nothing(shares: np.ndarray) -> np.ndarray:
    """Factors (n,) of at least 0 with which the shares (m, n) come nearest to 1 together.

    What noise makes negative is left out, and the others are fitted again.
    """
    found, left = np.zeros(shares.shape[1]), np.arange(shares.shape[1])
    while len(left):
        factors = np.linalg.lstsq(shares[:, left], np.ones(len(shares)), rcond=None)[0]
        if (factors >= 0).all():
            found[left] = factors
            break
        left = np.delete(left, factors.argmin())
    return found
