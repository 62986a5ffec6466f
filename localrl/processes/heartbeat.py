"""The pulse of a run: proof that it moves, and the place where it lets itself be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

from localrl.errors import Stopped

EVERY_S = 1.0
"""Between two signs of life that are passed on."""
SLEPT_S = 10.0
"""A shorter sleep of the machine is not worth a word."""


def _seconds_asleep_too() -> float:
    # macOS has no BOOTTIME: there CLOCK_MONOTONIC goes on while the machine sleeps, and Python's
    # time.monotonic does not.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Heartbeat:
    """Beats with every decode call, micro-batch and reward call.

    tell: gets a sign of life about once a second, while there are beats.
    awake, always: clocks, one of which stands still while the machine sleeps.
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
        """Why the run is to stop."""
        self.noticed = False
        """Whether a beat has stopped the run."""
        self.on_sleep: Callable[[float], None] | None = None
        """Gets the seconds that the machine has slept, at the first beat after it."""

    def stop(self, reason: str) -> None:
        """Let the next beat stop the run; the first reason counts.

        May be called from a signal handler or a thread.
        """
        if self.reason is None:
            self.reason = reason

    def beat(self) -> None:
        """Something has been done.

        Raises: Stopped when the run was asked to stop; what was begun since the last step is lost.
        """
        if self.reason is not None:
            self.noticed = True
            raise Stopped(self.reason)
        now = self._awake()
        if self._on_beat is not None and now - self._last >= EVERY_S:
            self._last = now
            self._on_beat()
        apart = self._always() - now
        slept, self._apart = apart - self._apart, apart
        if slept > SLEPT_S and self.on_sleep is not None:
            self.on_sleep(slept)
