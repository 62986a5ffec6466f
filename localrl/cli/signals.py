"""A run that is asked to stop saves at the first signal and ends at the second."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localrl.pulse import Pulse

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE = 130


@contextmanager
def stop_on_signals(pulse: Pulse, *, patience_s: float = 0.0) -> Iterator[None]:
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
        pulse.stop(name)
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not print: a signal may come in the middle of one.
            os.write(sys.stderr.fileno(), f"\n{name}: saving; once more ends it at once\n".encode())

    # One that is ignored stays so: nohup, and shells without job control, mean it.
    heard = [number for number in ASKED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
