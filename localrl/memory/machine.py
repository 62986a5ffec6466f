"""Readings of this machine's memory; an unknown reading is None.

They form one record, `Machine`, read from MLX's device information and the operating system: from
files below an injectable root on Linux (`localrl.memory.control_groups` reads the container's
part), from `sysctl` and `vm_stat` on a Mac.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localrl import backend
from localrl.backend import mx
from localrl.memory.control_groups import full_stalls, read_container

Pressure = Literal["normal", "warn", "critical"]
Run = Callable[[Sequence[str]], str | None]

WARN_STALL, CRITICAL_STALL = 10.0, 40.0
"""Thresholds in percent of the last ten seconds in which every task waited for memory (PSI's "full
avg10"). A tenth of the time is more than smaller batches cost; systemd-oomd kills at 60."""

SYSCTLS = ("hw.memsize", "kern.memorystatus_vm_pressure_level", "vm.swapusage")
LEVELS: dict[str, Pressure] = {"1": "normal", "2": "warn", "4": "critical"}
"""Pressure levels of macOS: DISPATCH_MEMORYPRESSURE_NORMAL, _WARN and _CRITICAL."""

AVAILABLE_PAGES = ("free", "inactive", "speculative")
SWAP_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

FOOTPRINT_AT, RUSAGE_BYTES = 72, 96
"""Offset of `ri_phys_footprint` in struct rusage_info_v0 (16 bytes of UUID, seven numbers of 8
bytes), and size of that struct."""


@dataclass(frozen=True)
class Machine:
    """One reading of a machine's memory, in bytes."""

    system: str
    """Operating system: "Darwin" or "Linux"."""
    device: str
    """Device: "metal", "cpu" or "cuda"; on CUDA, total and available are the GPU's own memory."""
    total_bytes: int | None = None
    available_bytes: int | None = None
    """Memory available without swapping; this process's memory is counted as used."""
    recommended_bytes: int | None = None
    """Metal's max_recommended_working_set_size."""
    largest_buffer_bytes: int | None = None
    """Metal's max_buffer_length."""
    container_bytes: int | None = None
    """Memory left below the limits of this process's control groups; None: no limit."""
    container_limit_bytes: int | None = None
    """The smallest of those limits."""
    swap_used_bytes: int | None = None
    pressure: Pressure | None = None
    resident_bytes: int | None = None
    """Memory this process holds now, MLX's arrays included."""


def run_command(command: Sequence[str]) -> str | None:
    """Return a command's output, even if it partly failed; None if it cannot be run."""
    # Other locales may use another decimal mark.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=5, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return told.stdout


def read_machine(
    *,
    system: str | None = None,
    device: str | None = None,
    info: Mapping[str, Any] | None = None,
    run: Run = run_command,
    root: Path = Path("/"),
    resident: Callable[[], int | None] | None = None,
) -> Machine:
    """Read this machine's current memory; on Linux in less than a millisecond.

    system, device, info (from `mx.device_info`), resident: read from MLX and Python if not given.
    run: runs a Mac's commands. root: folder that contains Linux's `proc` and `sys`.
    """
    system = platform.system() if system is None else system
    device = backend.describe().device if device is None else device
    info = mx.device_info() if info is None else info
    held = (resident_bytes if resident is None else resident)()
    if system == "Darwin":
        return _read_mac(device, info, run, held)
    return _read_linux(system, device, info, root, held)


def mac(total_gb: int) -> Machine:
    """A simulated Apple Silicon Mac with `total_gb` GiB, for plans; not a reading of any machine.

    The recommended working set is 2/3 of the memory up to 32 GiB and 3/4 above, the largest buffer
    3/4 of that set, as llama.cpp's logs in public issues show (10,922 MiB of 16 GiB, 21,845 of 32,
    49,152 of 64, 73,728 of 96; buffers of 8,192 MiB on 16 GiB and 55,296 on 96). Newer macOS
    recommends more (11.8 of 16 GiB, 107.5 of 128), so this is a conservative guess.

    3/8 of the memory is available, as on a Mac in use for days: `vm_stat`'s free and inactive pages
    were 37 % on one of 16 GiB, 39 % in oracle/graal#13141, 42 % in romkatv/powerlevel10k#1181; a
    fresh one has up to 3/4. That the process holds 0.5 GiB before loading a model is a guess.
    """
    total = total_gb * 2**30
    recommended = total * 2 // 3 if total_gb <= 32 else total * 3 // 4
    return Machine(
        system="Darwin",
        device="metal",
        total_bytes=total,
        available_bytes=total * 3 // 8,
        recommended_bytes=recommended,
        largest_buffer_bytes=recommended * 3 // 4,
        swap_used_bytes=0,
        pressure="normal",
        resident_bytes=2**29,
    )


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return Linux's estimate of the memory available without swapping; None elsewhere."""
    return _meminfo(meminfo).get("MemAvailable")


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Return the memory that this process holds now; None if it cannot be read."""
    import resource

    if sys.platform == "darwin":
        return _footprint()
    try:
        pages = int(statm.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def available_in(vm_stat: str) -> int | None:
    """Return the memory available without swapping, from the output of macOS's `vm_stat`.

    It sums free pages, pages read ahead ("speculative", which `vm_stat` excludes from the free
    ones) and pages not used recently ("inactive"). The last partly belong to other programs and are
    compressed first, so this is an upper estimate; only the pressure shows how close to exhaustion
    memory is. Pages that their owner can give up ("purgeable") are among the active and inactive
    ones already. The header has the page size: 16 KiB on Apple Silicon.
    """
    size = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = dict(re.findall(r"^Pages ([\w ]+):\s+(\d+)", vm_stat, re.MULTILINE))
    if size is None or not {"free", "inactive"} <= pages.keys():
        return None
    return int(size[1]) * sum(int(pages.get(kind, 0)) for kind in AVAILABLE_PAGES)


def _read_mac(device: str, info: Mapping[str, Any], run: Run, resident: int | None) -> Machine:
    # sysctl prints names too, because it omits the line of a value this macOS lacks.
    told = run(["sysctl", *SYSCTLS]) or ""
    values = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line)
    memory, level, swap = (values.get(name, "") for name in SYSCTLS)
    total = int(memory) if memory.strip().isdecimal() else info.get("memory_size")
    return Machine(
        system="Darwin",
        device=device,
        total_bytes=total,
        available_bytes=available_in(run(["vm_stat"]) or ""),
        recommended_bytes=info.get("max_recommended_working_set_size"),
        largest_buffer_bytes=info.get("max_buffer_length"),
        swap_used_bytes=_swap_used(swap),
        pressure=LEVELS.get(level.strip()),
        resident_bytes=resident,
    )


def _swap_used(text: str) -> int | None:
    """Read `vm.swapusage`; some locales have a decimal comma."""
    used = re.search(r"used = (\d+)(?:[.,](\d+))?([KMG])", text)
    return int(float(f"{used[1]}.{used[2] or 0}") * SWAP_UNITS[used[3]]) if used else None


def _read_linux(
    system: str, device: str, info: Mapping[str, Any], root: Path, resident: int | None
) -> Machine:
    memory = _meminfo(root / "proc/meminfo")
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    container = read_container(root)
    if device == "cuda":
        total, available = info.get("total_memory"), info.get("free_memory")
    swap = "SwapTotal" in memory and "SwapFree" in memory
    return Machine(
        system=system,
        device=device,
        total_bytes=total,
        available_bytes=available,
        container_bytes=container.left_bytes,
        container_limit_bytes=container.limit_bytes,
        swap_used_bytes=memory["SwapTotal"] - memory["SwapFree"] if swap else None,
        pressure=_pressure(full_stalls(root)),
        resident_bytes=resident,
    )


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name; empty if the file does not exist."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return {}
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def _pressure(stalls: Sequence[float]) -> Pressure | None:
    if not stalls:
        return None
    worst = max(stalls)
    if worst < WARN_STALL:
        return "normal"
    return "warn" if worst < CRITICAL_STALL else "critical"


def _footprint() -> int | None:
    """This process's footprint as macOS counts it: with Metal buffers and compressed memory."""
    try:
        system = ctypes.CDLL(None)
        answer = ctypes.create_string_buffer(RUSAGE_BYTES)
        if system.proc_pid_rusage(os.getpid(), 0, answer) != 0:
            return None
    except (AttributeError, OSError):
        return None
    return footprint_in(answer.raw)


def footprint_in(rusage: bytes) -> int:
    """Return the `ri_phys_footprint` of a struct rusage_info_v0."""
    return struct.unpack_from("=Q", rusage, FOOTPRINT_AT)[0]
