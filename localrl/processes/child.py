"""The child's side of supervision: reports to its supervisor, and notices the supervisor's end.

One socket, JSON lines. To the supervisor: `{"run": folder}`, `{"beat": true}` about once a second,
`{"step": n}` after each step. To the child: `{"stop": reason}`; when it closes, the supervisor has
ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VARIABLE = "LOCALRL_SUPERVISOR"
OUT_OF_MEMORY = 71
"""Exit status of a process that ran out of memory and could still report it."""
WATCHDOG = 72
"""Exit status of a process whose work the GPU's watchdog ended, which is no lack of memory."""
RELAX = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
"""Variable that makes macOS's GPU driver wait longer, if it is 1 when a process starts. MLX's
maintainers name it; it is not documented, and on some chips not enough while a display is on."""

DISPLAY = "Let the display sleep (pmset displaysleepnow)"
"""The cure that has always helped against the watchdog."""


@dataclass(frozen=True)
class Restart:
    """A supervisor's report on the processes before this one."""

    reason: str
    """Reason why the last one ended."""
    deaths: int
    """Number of processes that have died."""
    smaller: bool
    """True if the plan must become smaller than the last one's."""
    relaxed: bool = False
    """True if the supervisor has set `RELAX` for this process."""


class Supervisor:
    """The supervisor of this process, as the process sees it."""

    def __init__(self, channel: socket.socket, restart: Restart | None) -> None:
        self._channel = channel
        self.restart = restart
        """The restart report; None in the first process."""

    def tell(self, **message: Any) -> None:
        """Send one message. It is dropped if the socket is full, so it never blocks the run."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def beat(self) -> None:
        """Send a sign of life."""
        self.tell(beat=True)

    def watch(self, stop: Callable[[str], None]) -> None:
        """From now on, call `stop` with the reason if the supervisor asks for it, or has ended."""
        threading.Thread(target=self._listen, args=(stop,), daemon=True).start()

    def _listen(self, stop: Callable[[str], None]) -> None:
        # A supervisor that died with unread messages resets the connection.
        with contextlib.suppress(OSError), self._channel.makefile("rb") as lines:
            for line in lines:
                stop(json.loads(line)["stop"])
        stop("the end of its supervisor")


def find_supervisor() -> Supervisor | None:
    """Return the supervisor that started this process; None if there is none.

    Removes the supervisor's variable from the environment, so that child processes do not find it.
    """
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    message = json.loads(text)
    channel = socket.socket(fileno=message["channel"])
    channel.set_inheritable(False)
    restart = message["restart"]
    return Supervisor(channel, Restart(**restart) if restart else None)
