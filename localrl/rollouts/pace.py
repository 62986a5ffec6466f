"""The speed of decoding, fitted while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class Pace:
    """Seconds of prefills, and of decode calls as a line over their number of rows."""

    prompts: int = 0
    """Number of prompts prefilled."""
    prefill_s: float = 0.0
    calls: int = 0
    _rows: float = 0.0
    _squares: float = 0.0
    _seconds: float = 0.0
    _products: float = 0.0

    def read(self, prompts: int, seconds: float) -> None:
        """Add a prefill."""
        self.prompts += prompts
        self.prefill_s += seconds

    def stepped(self, rows: int, seconds: float) -> None:
        """Add a decode call."""
        self.calls += 1
        self._rows += rows
        self._squares += rows * rows
        self._seconds += seconds
        self._products += rows * seconds

    def line(self) -> tuple[float, float]:
        """Return the seconds of a call and of each row in it: least squares, neither below 0."""
        if not self.calls:
            return 0.0, 0.0
        spread = self.calls * self._squares - self._rows**2
        slope = 0.0
        if spread > 0:
            slope = (self.calls * self._products - self._rows * self._seconds) / spread
        slope = min(max(slope, 0.0), self._seconds / self._rows)
        return (self._seconds - slope * self._rows) / self.calls, slope

    def expected_s(
        self, prompts: int, lengths: Sequence[int], completions: int, rows: int
    ) -> float:
        """Seconds to sample completions of new prompts, whose lengths are distributed like these.

        rows: most that are decoded at once. With S(t) the share of lengths above t and n the
        completions, n S(t) rows are decoded in call t, and there is such a call with probability
        1 - (1 - S(t))^n; where rows are refilled, there are at least n E[length] / rows calls.
        """
        call_s, row_s = self.line()
        drawn = np.array(lengths)
        alive = 1 - np.searchsorted(np.sort(drawn), np.arange(drawn.max()), "right") / len(drawn)
        at_once = min(completions, rows)
        tokens = completions * float(drawn.mean())
        calls = max(float((1 - (1 - alive) ** at_once).sum()), tokens / at_once)
        return call_s * calls + row_s * tokens + prompts * self.prefill_s / max(self.prompts, 1)
