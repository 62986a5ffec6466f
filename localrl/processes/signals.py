"""Passes signals from the user through a supervisor to its child."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from typing import Self

AT_ONCE = 130


class StopRequest:
    """Context in which the first Ctrl-C, SIGTERM or SIGHUP is passed on to the child, once.

    The second kills the child and ends this process with status 130. Ctrl-Z stops and continues
    both.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal received; None if there was none."""
        self._child: subprocess.Popen[bytes] | None = None
        self._passed = False
        self._came = threading.Event()

    def __enter__(self) -> Self:
        handlers = {**dict.fromkeys(self.NUMBERS, self._ask), signal.SIGTSTP: self._halt}
        # Ignored signals stay ignored: nohup and shells without job control rely on it.
        heard = {n: h for n, h in handlers.items() if signal.getsignal(n) is not signal.SIG_IGN}
        self._before = {number: signal.signal(number, heard[number]) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def adopt(self, child: subprocess.Popen[bytes] | None) -> None:
        """Send signals to this child from now on, and an earlier one at once."""
        self._child, self._passed = child, False
        self._pass()

    def wait(self, seconds: float) -> None:
        """Wait until a signal comes, or for this many seconds."""
        self._came.wait(seconds)

    def _ask(self, number: int, _: object) -> None:
        if self.number is not None:
            self._kill(signal.SIGKILL)
            os._exit(AT_ONCE)
        self.number = number
        self._came.set()
        self._pass()

    def _pass(self) -> None:
        if self._child is not None and self.number is not None and not self._passed:
            self._passed = True
            self._child.send_signal(self.number)

    def _halt(self, *_: object) -> None:
        self._kill(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._kill(signal.SIGCONT)

    def _kill(self, number: int) -> None:
        """Send a signal to the child's process group."""
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, number)
