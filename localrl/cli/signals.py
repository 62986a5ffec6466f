"""What signals do: a run saves at the first and ends at the second; a download tidies up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localrl.processes.heartbeat import Heartbeat

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE = 130


@contextmanager
def stop_on_signals(heartbeat: Heartbeat, *, patience_s: float = 0.0) -> Iterator[None]:
    """Within this context the first Ctrl-C, SIGTERM or SIGHUP stops the run at its next beat.

    The second one ends the process at once, with status 130 and what is on the disk. But for Ctrl-C
    it must come so many seconds after the first: a launcher sends two in a row.
    """
    asked: float | None = None

    def ask(number: int, _: object) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is not None:
            if number == signal.SIGINT or now - asked >= patience_s:
                os._exit(AT_ONCE)
            return
        asked = now
        name = signal.Signals(number).name
        heartbeat.stop(name)
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not print: a signal may come in the middle of one.
            os.write(sys.stderr.fileno(), f"\n{name}: saving; once more ends it at once\n".encode())

    with _handled_by(ask):
        yield


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP are what Ctrl-C is: an exception, which tidies up."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # One that is ignored stays so: nohup, and shells without job control, mean it.
    heard = [number for number in ASKED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
