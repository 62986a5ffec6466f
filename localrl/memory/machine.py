"""What is known of this machine's memory; an unknown reading is None."""

from __future__ import annotations

from pathlib import Path


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping, as Linux estimates it; None elsewhere."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Memory that this process holds now; None where it cannot be read."""
    import resource

    try:
        pages = int(statm.read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()
