"""Memory limits of this process's Linux control groups, e.g. those of a container or service.

Version 2 has one tree of groups, version 1 a separate one for memory; both may be mounted. The
limits of all groups from this process's up to the root apply, so the tightest one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 2**60
"""Numbers from this size on mean "no limit" in the files of version 1."""


@dataclass(frozen=True)
class Container:
    """The memory the control groups allow, in bytes; None: no limit."""

    limit_bytes: int | None
    left_bytes: int | None


@dataclass(frozen=True)
class _Names:
    """The file names used by one version of control groups."""

    mount: str
    limits: tuple[str, ...]
    used: str
    cached: str
    """Key in memory.stat of inactive file pages, which are reclaimed before the limit applies."""


_V2 = _Names("", ("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Names("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def read_container(root: Path = Path("/")) -> Container:
    """Return the tightest limit of this process's groups, and the least memory left below any."""
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
    """Percent of the last ten seconds that all tasks waited for memory, for the system and for this
    process's own group, which may be short of memory when the system is not."""
    own = [folder / "memory.pressure" for names, folder in _groups(root) if names is _V2]
    found = []
    for file in (root / "proc/pressure/memory", *own[:1]):
        match = re.search(r"^full avg10=([\d.]+)", _text(file), re.MULTILINE)
        if match:
            found.append(float(match[1]))
    return found


def _groups(root: Path) -> Iterator[tuple[_Names, Path]]:
    """Yield the folders of this process's groups: each version's own first, then its parents.

    Inside a container the path may be the host's, which does not exist there; then the mount itself
    is the container's group.
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
