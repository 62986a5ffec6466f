"""The child's side of supervision: what it tells its supervisor, and how it learns of its end.

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
"""The status of a process that ran out of memory and could still say so."""


@dataclass(frozen=True)
class Restart:
    """What a supervisor says of the processes before this one."""

    reason: str
    """How the last one ended."""
    deaths: int
    """How many there have been."""
    smaller: bool
    """Whether the plan that it had is to be made smaller."""


class Supervisor:
    """The supervisor of this process, as the process sees it."""

    def __init__(self, channel: socket.socket, restart: Restart | None) -> None:
        self._channel = channel
        self.restart = restart
        """None when this is the first process."""

    def tell(self, **message: Any) -> None:
        """Send one message. One that finds no room is lost: it never holds the run up."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def beat(self) -> None:
        """A sign of life."""
        self.tell(beat=True)

    def watch(self, stop: Callable[[str], None]) -> None:
        """From now on, call `stop` with the reason when it asks for that, or has ended."""
        threading.Thread(target=self._listen, args=(stop,), daemon=True).start()

    def _listen(self, stop: Callable[[str], None]) -> None:
        # A supervisor that died with messages unread resets the connection.
        with contextlib.suppress(OSError), self._channel.makefile("rb") as lines:
            for line in lines:
                stop(json.loads(line)["stop"])
        stop("the end of its supervisor")


def find_supervisor() -> Supervisor | None:
    """The supervisor that started this process; None when there is none.

    What it left in the environment is taken out, so that no child of this process finds it.
    """
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    message = json.loads(text)
    channel = socket.socket(fileno=message["channel"])
    channel.set_inheritable(False)
    restart = message["restart"]
    return Supervisor(channel, Restart(**restart) if restart else None)
