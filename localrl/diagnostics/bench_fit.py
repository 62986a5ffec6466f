"""Fits the time of a decode step to the number of rows and the length, by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SPANS = 4
"""Parts of a completion whose times are fitted separately, for the effect of its length."""
LONG = 32
"""Number of tokens from which the fit has a term for the length."""


@dataclass(frozen=True)
class Fit:
    """step time = a + b rows + c rows length, in ms; length in tokens, including the prompt.

    No factor is below 0.
    """

    a_ms: float
    b_ms: float
    c_ms: float | None
    """None if completions were too short to determine it."""
    residual: float
    """Root mean square error of the fit, as a share of the time."""


def fit(steps: Mapping[int, np.ndarray], prompt_tokens: int) -> Fit | None:
    """Fit the time of each span of each row count by least squares, relative to the time.

    steps: maps rows to (tokens - 1,) seconds. None if there are too few row counts.
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
    terms, measured = np.array(equations), np.array(times)
    found = _no_less_than_nothing(terms / measured[:, None])
    wrong = terms @ found / measured - 1
    a, b = map(float, found[:2])
    return Fit(a, b, float(found[2]) if with_length else None, float(np.sqrt((wrong**2).mean())))


def _no_less_than_nothing(shares: np.ndarray) -> np.ndarray:
    """Return factors (n,) of at least 0 with which the shares (m, n) sum up closest to 1.

    Factors that noise makes negative are left out, and the others are fitted again.
    """
    found, left = np.zeros(shares.shape[1]), np.arange(shares.shape[1])
    while len(left):
        factors = np.linalg.lstsq(shares[:, left], np.ones(len(shares)), rcond=None)[0]
        if (factors >= 0).all():
            found[left] = factors
            break
        left = np.delete(left, factors.argmin())
    return found
