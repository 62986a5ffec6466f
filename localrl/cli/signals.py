"""Signal handlers: a run saves at the first signal and ends at the second; a download cleans up."""

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
    """Make the first Ctrl-C, SIGTERM or SIGHUP stop the run at its next heartbeat.

    The second one ends the process immediately with status 130, keeping only what is on disk.
    Unless it is Ctrl-C, it must come at least `patience_s` seconds after the first, because a
    launcher sends two in a row.
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
        name = _spoken(number)
        heartbeat.stop(name)
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not print: the signal may interrupt another print.
            os.write(
                sys.stderr.fileno(),
                f"\n{name}: saving; once more ends the run immediately\n".encode(),
            )

    with _handled_by(ask):
        yield


def _spoken(number: int) -> str:
    """Name a signal as the person who sent it would."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception as Ctrl-C does, so that cleanup runs."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # A signal that is ignored stays ignored: nohup and shells without job control rely on it.
    heard = [number for number in ASKED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
