"""How long a run may give no sign of life."""

from __future__ import annotations

from dataclasses import dataclass

NOT_LOOKED_S = 10.0
"""Whoever has not looked for so long was asleep or stopped himself, and cannot blame the run."""


@dataclass(frozen=True)
class StallLimits:
    """When a supervisor acts; seconds, where they are not numbers of times."""

    times: float = 6.0
    """A silence may be so many times the longest one so far,"""
    floor_s: float = 90.0
    """at least this,"""
    cap_s: float = 900.0
    """and at most this; always this until a whole step is done."""
    grace_s: float = 10.0
    """Between asking a silent run to end and ending it."""
    deaths: int = 3
    """So many deaths without progress, and it gives up."""
    power_every_s: float = 60.0
    """Between two looks at the battery."""


class Patience:
    """Tells a stall from slow work. All times are of one clock, which its user reads."""

    def __init__(self, limits: StallLimits, now: float) -> None:
        self._limits = limits
        self._last = self._looked = now
        self._slowest: float | None = None
        self.settled = False
        """Whether a whole step is done: then every kind of work has been timed."""

    def beat(self, now: float) -> None:
        """A sign of life has come."""
        self._look(now)
        if self._slowest is None:
            self._slowest = 0.0  # loading is not an interval between two beats
        else:
            self._slowest = max(self._slowest, now - self._last)
        self._last = now

    @property
    def limit_s(self) -> float:
        """The silence that is allowed now."""
        limits = self._limits
        if not self.settled or self._slowest is None:
            return limits.cap_s
        return min(limits.cap_s, max(limits.floor_s, limits.times * self._slowest))

    def silence(self, now: float) -> float | None:
        """How long the silence has been, once it is longer than allowed."""
        self._look(now)
        return now - self._last if now - self._last > self.limit_s else None

    def _look(self, now: float) -> None:
        away = now - self._looked
        if away > NOT_LOOKED_S:
            self._last += away
        self._looked = now
