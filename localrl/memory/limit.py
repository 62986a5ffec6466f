"""The memory limit for MLX: a part of the user's setting, or the memory this machine can spare.

A setting bounds the whole process: what it holds besides MLX's arrays (Python, libraries, the
tokenizer), and what is known to come, is subtracted, and MLX's active and cached memory gets the
rest. The processes that the run starts (rewards, code in answers) have limits of their own.
Without a setting nothing is subtracted from the machine's available memory or the memory left to a
container, which already count the process as used, but from a limit derived from the total.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal

from localrl.errors import ConfigError
from localrl.memory.machine import Machine
from localrl.settings import LIMIT_FORM

UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}
"""Bytes per unit; units are case-insensitive."""

MARGIN = 0.8
"""Fraction of the memory MLX may use: estimates are not exact, and other programs need memory too.
Close to the whole recommended working set Metal swaps before it refuses."""

SMALL_BYTES, SMALL_RESERVE, LARGE_RESERVE = 16 * 2**30, 4 * 2**30, 6 * 2**30
"""Macs with up to SMALL_BYTES reserve SMALL_RESERVE for the system and other programs, larger ones
LARGE_RESERVE: macOS with a browser takes about 4 GiB, and larger Macs run more besides."""


LATER = 64 * 10**6
"""Bytes that the process comes to hold besides MLX's arrays after its plan is made: NumPy's small
arrays, the allocator's gaps. `benchmarks/memory.md` has measurements; the part of the limit that
no plan promises covers what is more."""
SPREAD = 8 * 10**6
"""Bytes by which two starts of the same run differ in what the process holds."""


@dataclass(frozen=True)
class Limit:
    """The limit for MLX's active and cached memory together."""

    bytes: int | None
    """Limit in bytes; None if memory is unknown and nothing is limited."""
    reason: str
    from_machine: bool
    """True if derived from readings of the machine, False if set by the user."""
    beside_bytes: int = 0
    """Bytes of the process besides: a setting must be larger than `bytes` by so much."""

    def setting(self, size: int) -> int:
        """Smallest setting `memory.limit`, in bytes, that leaves MLX so many."""
        return size + self.beside_bytes


def parse_limit(text: str) -> int | float:
    """Parse a limit to bytes (int), or to a fraction of the machine's memory (float, 0 < f <= 1).

    GB and MB are 10**9 and 10**6 bytes, GiB and MiB 2**30 and 2**20; `70%` is a share.

    Raises: ConfigError if it is none of these, is 0, or is more than 100 %.
    """
    found = re.fullmatch(LIMIT_FORM, text)
    if not found:
        raise ConfigError(
            f"memory.limit is {text!r}; it must be a size or a share, e.g. 6GB, 600MiB or 70%."
        )
    number, unit = Decimal(found[1]), found[2].upper()
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(f"memory.limit is {text!r}; a share is above 0% and at most 100%.")
        return float(number / 100)
    size = int(number * UNITS[unit])
    if size < 1:
        raise ConfigError(f"memory.limit is {text!r}; it must be above 0, for example 6GB.")
    return size


def write_limit(size: int) -> str:
    """Format a number of bytes for `parse_limit`, rounded up to whole megabytes."""
    return f"{-(-size // 10**6)}MB"


def memory_limit(wish: str | None, machine: Machine, held: int = 0) -> Limit:
    """Determine the limit for MLX's active and cached memory on this machine.

    wish: the setting `memory.limit` for the whole process: a size, or a share of the machine's
    memory, or of its container's if that is less.
    held: bytes of MLX's active and cached memory when the machine was read. The run may keep them,
    so the limit can be computed again during a run.

    Raises: ConfigError if the setting cannot be parsed, is more than the machine has, or is a share
    of a memory that is unknown.
    """
    if wish is not None:
        return _wished(wish, machine, held)
    found = _on_metal(machine, held) if machine.device == "metal" else _on_host(machine, held)
    return replace(found, beside_bytes=beside_mlx(machine, held) + SPREAD)


def beside_mlx(machine: Machine, held: int) -> int:
    """Bytes that this process holds besides MLX's arrays, and those that it will hold later.

    On a GPU with memory of its own nothing of it counts there.
    """
    if machine.device == "cuda":
        return 0
    return max(0, (machine.resident_bytes or 0) - held) + LATER


def show(size: int) -> str:
    """Format a number of bytes for display."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


def _wished(wish: str, machine: Machine, held: int) -> Limit:
    size, reason = _whole(wish, machine)
    beside = beside_mlx(machine, held)
    if beside:
        reason = f"{reason}, minus {show(beside)} for the process besides MLX's arrays"
    # SPREAD: the setting that a refusal names has to do at the next start too.
    return Limit(max(0, size - beside), reason, False, beside + SPREAD)


def _whole(wish: str, machine: Machine) -> tuple[int, str]:
    """The limit for the whole process in bytes, and its source in words."""
    size = parse_limit(wish)
    ceilings = [(machine.total_bytes, "machine"), (_container_limit(machine), "container")]
    known = [(ceiling, name) for ceiling, name in ceilings if ceiling is not None]
    total, place = min(known, default=(None, "machine"))
    if isinstance(size, float):
        if total is None:
            raise ConfigError(
                f"memory.limit is {wish!r}, a share, but this machine's memory cannot be read. "
                "Give a size instead, for example --memory-limit 6GB."
            )
        return int(size * total), f"memory.limit: {wish} of this {place}'s {show(total)}"
    if total is not None and size > total:
        raise ConfigError(
            f"memory.limit is {wish!r}, but this {place} has {show(total)} ({total} bytes) in "
            "total. Lower it or leave it out."
        )
    return size, f"memory.limit: {wish}"


def _on_metal(machine: Machine, held: int) -> Limit:
    """The least of: most of Metal's recommendation, available memory, total minus reserve."""
    recommended, available = machine.recommended_bytes, machine.available_bytes
    total = machine.total_bytes
    if recommended is None or available is None or total is None:
        readings = {
            "Metal's recommended working set": recommended,
            "available memory": available,
            "total memory": total,
        }
        return _unknown(*(name for name, value in readings.items() if value is None))
    reserve = SMALL_RESERVE if total <= SMALL_BYTES else LARGE_RESERVE
    own = max(0, (machine.resident_bytes or 0) - held)
    return _least(
        (MARGIN * recommended, f"80 % of the {show(recommended)} that Metal recommends"),
        (available + held, f"the available memory, out of {show(total)}"),
        (
            total - reserve - own,
            f"{show(total)} in total, minus {show(reserve)} for the system and {show(own)} that "
            "this process holds besides MLX",
        ),
    )


def _on_host(machine: Machine, held: int) -> Limit:
    left = machine.container_bytes if machine.device != "cuda" else None
    what = {"available memory": machine.available_bytes, "memory left to this container": left}
    free = [
        (MARGIN * (size + held), f"80 % of {name}, {show(size + held)}")
        for name, size in what.items()
        if size is not None
    ]
    return _least(*free) if free else _unknown("available memory")


def _least(*choices: tuple[float, str]) -> Limit:
    size, reason = min(choices)
    return Limit(max(0, int(size)), reason, from_machine=True)


def _unknown(*names: str) -> Limit:
    return Limit(None, f"{' and '.join(names)} cannot be read", from_machine=True)


def _container_limit(machine: Machine) -> int | None:
    return machine.container_limit_bytes if machine.device != "cuda" else None
