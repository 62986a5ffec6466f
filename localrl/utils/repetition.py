"""Detects repetition in a text, to stop decoding and to exclude it from learning."""

from __future__ import annotations

import numpy as np

LONGEST_PERIOD = 64
SHORTEST_LOOP = 48
"""Shortest loop in tokens, however short its period: shorter repetition may be intended."""
PERIODS = np.arange(1, LONGEST_PERIOD + 1)
NEEDED = np.maximum(3 * PERIODS, SHORTEST_LOOP) - PERIODS
"""For each period, the number of consecutive tokens that must equal the one a period before: a loop
is three periods, and at least SHORTEST_LOOP tokens, without counting the first period itself."""


def repeated_from(token_ids: np.ndarray) -> int | None:
    """Return the index from which a completion only repeats itself; None if it ends in no loop.

    It is the index of the first token after the second period, counted from the start of the
    longest tail that has the period; of several periods, the shortest.
    """
    tokens = np.asarray(token_ids)
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 3) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        start = int(differs[-1]) + 1 if len(differs) else 0
        if len(tokens) - start - period >= NEEDED[period - 1]:
            return start + 2 * period
    return None
