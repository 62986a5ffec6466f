"""Memory limits that Linux sets to this process's control groups: a container's, a service's.

Version 2 has one tree of groups, version 1 one for memory; both may be mounted. A limit of any
group on the way from this process's up to the root holds, so the tightest one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 2**60
"""From here on a number in version 1's files means that there is no limit."""


@dataclass(frozen=True)
class Container:
    """What the control groups allow, in bytes; None: no limit."""

    limit_bytes: int | None
    left_bytes: int | None


@dataclass(frozen=True)
class _Names:
    """Where a version keeps its numbers."""

    mount: str
    limits: tuple[str, ...]
    used: str
    cached: str
    """In memory.stat: file pages not used lately, which give way before the limit is reached."""


_V2 = _Names("", ("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Names("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def read_container(root: Path = Path("/")) -> Container:
    """The tightest limit of this process's groups, and the least that is left below any."""
    limits, left = [], []
    for names, folder in _groups(root):
        found = [_number(folder / name) for name in names.limits]
        known = [limit for limit in found if limit is not None and limit < NO_LIMIT]
        if not known:
            continue
        limits.append(min(known))
        used = _number(folder / names.used)
        if used is not None:
            cached = _stat(folder / "memory.stat", names.cached)
            left.append(max(0, min(known) - max(0, used - cached)))
    return Container(min(limits, default=None), min(left, default=None))


def full_stalls(root: Path = Path("/")) -> list[float]:
    """Percent of the last ten seconds that all tasks waited for memory: of the system, and of this
    process's own group, which may be short of memory when the system is not."""
    own = [folder / "memory.pressure" for names, folder in _groups(root) if names is _V2]
    found = []
    for file in (root / "proc/pressure/memory", *own[:1]):
        match = re.search(r"^full avg10=([\d.]+)", _text(file), re.MULTILINE)
        if match:
            found.append(float(match[1]))
    return found


def _groups(root: Path) -> Iterator[tuple[_Names, Path]]:
    """The folders of this process's groups, each version's own first, then its parents.

    Inside a container the path may be the host's, which is not there; then the mount itself is the
    container's group.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            names = _V2
        elif "memory" in controllers.split(","):
            names = _V1
        else:
            continue
        mount = mounts / names.mount
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if folder.is_dir():
                yield names, folder


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _stat(file: Path, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", _text(file), re.MULTILINE)
    return int(match[1]) if match else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
