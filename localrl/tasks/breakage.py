"""Counts of the user's own code that broke: a run with too much of it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from localrl.errors import RewardError

WINDOW = 200
TOLERATED = 0.2
"""Share of the last WINDOW tries that may break; judged from LEAST on."""
LEAST = 50


@dataclass(eq=False)
class Breakage:
    """The latest tries of something that may break, and the first time that it did."""

    name: str
    """Its name, as in "environment"."""
    tries: str
    """Name of what is counted, as in "turns"."""
    warn: Callable[[str], None]
    _broken: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, errors: Sequence[str], count: int, details: str = "") -> None:
        """Count the errors of `count` tries; warn of the first one. details: more on the latest.

        Raises: RewardError if too many break.
        """
        if errors and not any(self._broken):
            self.warn(
                f"The {self.name} broke: {errors[0]}. {len(errors)} of {count} completions "
                "end here without a reward. Further failures are counted but not shown."
            )
        self._broken.extend([True] * len(errors) + [False] * (count - len(errors)))
        share = sum(self._broken) / max(len(self._broken), 1)
        if len(self._broken) >= LEAST and share > TOLERATED:
            raise RewardError(
                f"The {self.name} broke in {share:.0%} of the last {len(self._broken)} "
                f"{self.tries}. Fix it, then start again. Latest error: "
                f"{errors[-1] if errors else 'none'}\n{details}".rstrip()
            )
