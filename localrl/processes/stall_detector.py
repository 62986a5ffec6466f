"""Decides how long a run may give no sign of life."""

from __future__ import annotations

from dataclasses import dataclass

NOT_LOOKED_S = 10.0
"""Seconds without a check after which the observer itself was asleep or stopped, not the run."""


@dataclass(frozen=True)
class StallLimits:
    """Limits at which a supervisor acts; in seconds, except for counts and factors."""

    times: float = 6.0
    """Longest silence allowed, as a multiple of the longest one so far."""
    floor_s: float = 90.0
    """Lower bound of that limit."""
    cap_s: float = 900.0
    """Upper bound of that limit; it also applies until a whole step is done."""
    grace_s: float = 10.0
    """Time between asking a silent run to end and killing it."""
    deaths: int = 3
    """Number of deaths without progress after which the supervisor gives up."""
    power_every_s: float = 60.0
    """Time between two readings of the battery."""


class StallDetector:
    """Tells a stall from slow work. All times come from one clock, which the caller reads."""

    def __init__(self, limits: StallLimits, now: float) -> None:
        self._limits = limits
        self._last = self._looked = now
        self._slowest: float | None = None
        self.settled = False
        """True once a whole step is done: then every kind of work has been timed."""

    def beat(self, now: float) -> None:
        """Record a sign of life."""
        self._look(now)
        if self._slowest is None:
            self._slowest = 0.0  # loading is not an interval between two beats
        else:
            self._slowest = max(self._slowest, now - self._last)
        self._last = now

    @property
    def limit_s(self) -> float:
        """The longest silence allowed now, in seconds."""
        limits = self._limits
        if not self.settled or self._slowest is None:
            return limits.cap_s
        return min(limits.cap_s, max(limits.floor_s, limits.times * self._slowest))

    def silence(self, now: float) -> float | None:
        """Return the length of the silence in seconds if it is longer than allowed, else None."""
        self._look(now)
        return now - self._last if now - self._last > self.limit_s else None

    def _look(self, now: float) -> None:
        away = now - self._looked
        if away > NOT_LOOKED_S:
            self._last += away
        self._looked = now
