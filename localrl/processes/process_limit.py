"""The kernel's limit on the number of a user's processes, relative to those that are there."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys

ROOM = 512
ROOM_PER_CORE = 64


def tasks_of_user() -> int:
    """Number of tasks (threads on Linux, processes elsewhere) that run under this user's id."""
    user, found = os.geteuid(), 0
    if sys.platform != "linux":
        return _tasks_by_ps(user)
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                if os.stat(f"/proc/{name}").st_uid == user:
                    found += os.stat(f"/proc/{name}/task").st_nlink - 2
    return found


def _tasks_by_ps(user: int) -> int:
    command = ["ps", "-U", str(user), "-o", "pid="]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(result.stdout.splitlines())


def worker_process_limit() -> int:
    """Limit for code of the user's own: enough for pools, too little to take the machine down."""
    return tasks_of_user() + ROOM + ROOM_PER_CORE * (os.cpu_count() or 1)


def counted_per_namespace(release: str | None = None) -> bool:
    """True if the kernel counts a user namespace's processes apart, as Linux does since 5.14."""
    found = re.match(r"(\d+)\.(\d+)", release or platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= (5, 14)
