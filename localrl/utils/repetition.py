"""When a text repeats itself: what decoding stops for, and what is not learned from."""

from __future__ import annotations

import numpy as np

LONGEST_PERIOD = 64
SHORTEST_LOOP = 48
"""Tokens of a loop, however short its period: shorter repetition may be meant."""
PERIODS = np.arange(1, LONGEST_PERIOD + 1)
NEEDED = np.maximum(3 * PERIODS, SHORTEST_LOOP) - PERIODS
"""For each period, how many tokens in a row equal the one a period before when a loop is found:
three periods, and at least SHORTEST_LOOP tokens, the first period itself not counted."""


def repeated_from(token_ids: np.ndarray) -> int | None:
    """Where a completion that ends in a loop has said everything twice; None without a loop.

    The index of the first token after the second period, counted from the start of the longest
    tail that has the period; of several periods, the shortest.
    """
    tokens = np.asarray(token_ids)
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 3) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        start = int(differs[-1]) + 1 if len(differs) else 0
        if len(tokens) - start - period >= NEEDED[period - 1]:
            return start + 2 * period
    return None
