"""The heartbeat of a run: a sign that it makes progress, and the point where it can be stopped.

Every beat may also say what is being done; a display reads that from another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from localrl.errors import Stopped
from localrl.records import Work

EVERY_S = 1.0
"""Seconds between two signs of life that are passed on."""
SLEPT_S = 10.0
"""Shortest sleep of the machine, in seconds, that is reported."""


def _seconds_asleep_too() -> float:
    # macOS has no BOOTTIME: there CLOCK_MONOTONIC continues while the machine sleeps, but Python's
    # time.monotonic does not.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Heartbeat:
    """Beats with every decode call, micro-batch and reward call.

    on_beat: called about once a second, while there are beats. awake, always: clocks; the first
    stands still while the machine sleeps.
    """

    def __init__(
        self,
        on_beat: Callable[[], None] | None = None,
        *,
        awake: Callable[[], float] = time.monotonic,
        always: Callable[[], float] = _seconds_asleep_too,
    ) -> None:
        self._on_beat = on_beat
        self._awake, self._always = awake, always
        self._last = float("-inf")
        self._apart = always() - awake()
        self.reason: str | None = None
        """Reason why the run must stop; None if it need not."""
        self.work: Work | None = None
        """The work that a beat last named."""
        self.noticed = False
        """True if a beat has stopped the run."""
        self.on_sleep: Callable[[float], None] | None = None
        """Called with the seconds that the machine slept, at the first beat after it wakes."""

    def stop(self, reason: str) -> None:
        """Make the next beat stop the run; the first reason counts.

        May be called from a signal handler or a thread.
        """
        if self.reason is None:
            self.reason = reason

    def beat(self, work: Work | None = None) -> None:
        """Record that some work is done, or begins. work: what it is; None: as before.

        Raises: Stopped if the run was asked to stop; work begun since the last step is lost.
        """
        if self.reason is not None:
            self.noticed = True
            raise Stopped(self.reason)
        self.work = work or self.work
        now = self._awake()
        if self._on_beat is not None and now - self._last >= EVERY_S:
            self._last = now
            self._on_beat()
        apart = self._always() - now
        slept, self._apart = apart - self._apart, apart
        if slept > SLEPT_S and self.on_sleep is not None:
            self.on_sleep(slept)
