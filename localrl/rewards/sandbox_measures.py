"""Measures a program from outside: its memory and its folder."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from localrl.processes.worker import resident_bytes

ENTRY_LIMIT = 10_000


def memory_bytes(pids: list[int]) -> int:
    """Resident memory of the processes, and the files without a name that they hold open."""
    if sys.platform == "linux":  # no need to ask `ps` about one that has just ended
        pids = [pid for pid in pids if os.path.exists(f"/proc/{pid}/statm")]
    return sum(resident_bytes(pid) or 0 for pid in pids) + _nameless_bytes(pids)


def _nameless_bytes(pids: list[int]) -> int:
    """Size of deleted files and of those that were only ever in memory, on Linux."""
    sizes: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as listing:
            for entry in listing:
                with contextlib.suppress(OSError):
                    status = os.stat(entry.path)
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                        sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def folder_is_full(folder: Path, limit_bytes: int) -> bool:
    """True if the files in a folder are larger than the limit together, or more than 10 000."""
    size = entries = 0
    queue = [os.fspath(folder)]
    while queue:
        with contextlib.suppress(OSError), os.scandir(queue.pop()) as listing:
            for entry in listing:
                entries += 1
                if entries > ENTRY_LIMIT:
                    return True
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    size += status.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
    return size > limit_bytes
