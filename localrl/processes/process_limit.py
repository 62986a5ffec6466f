"""Counts processes, for limits on how many there may be."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOM = 1024
ROOM_PER_CORE = 64


def tasks_of_user() -> int | None:
    """Number of tasks (threads on Linux, processes elsewhere) that run under this user's id.

    None if the system does not tell.
    """
    user, found = os.geteuid(), 0
    if sys.platform != "linux":
        return _tasks_by_ps(user)
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                if os.stat(f"/proc/{name}").st_uid == user:
                    found += os.stat(f"/proc/{name}/task").st_nlink - 2
    return found


def _tasks_by_ps(user: int) -> int | None:
    command = ["ps", "-A", "-o", "uid="]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split().count(str(user))


def worker_room() -> int:
    """Number of processes that code of the user's own may start: enough for pools, no more."""
    return ROOM + ROOM_PER_CORE * (os.cpu_count() or 1)


def counted_per_namespace(release: str | None = None) -> bool:
    """True if the kernel counts a user namespace's processes apart, as Linux does since 5.14."""
    found = re.match(r"(\d+)\.(\d+)", release or platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= (5, 14)


def children(pid: int) -> list[int]:
    """Process ids of the direct children of a process, on Linux; empty elsewhere."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                found += map(int, text.split())
    return found


def family(pid: int, limit: int) -> list[int]:
    """Process ids of a process and of its descendants; those found so far at the limit."""
    found = queue = [pid]
    while queue and len(found) < limit:
        queue = [child for parent in queue for child in children(parent)]
        found = [*found, *queue]
    return found
