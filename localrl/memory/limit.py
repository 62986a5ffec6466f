"""The most that MLX may hold: what the user says, or what this machine can spare.

The limit bounds MLX's active and cached memory. The rest of what this process holds (Python,
libraries, tokenizers) has been counted as used already in the memory that is available and in what
is left to a container, so it is subtracted only where the limit is counted from the total; a wish
is taken as it is, and the process's resident memory is shown beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from localrl.config import LIMIT_FORM
from localrl.errors import ConfigError
from localrl.memory.machine import Machine

UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}
"""Bytes; capitals and small letters are the same."""

MARGIN = 0.8
"""Of what there is, what MLX may take: its estimates are not exact, and others ask for memory too.
Near the whole recommended set Metal swaps before it refuses."""

SMALL_BYTES, SMALL_RESERVE, LARGE_RESERVE = 16 * 2**30, 4 * 2**30, 6 * 2**30
"""Macs up to the first keep the second for the system and other programs, larger ones the third:
macOS with a browser takes some 4 GiB, and on larger Macs more runs beside it."""


@dataclass(frozen=True)
class Limit:
    """How many bytes MLX's active and cached memory may take together."""

    bytes: int | None
    """None: unknown, nothing is limited."""
    reason: str
    from_machine: bool
    """Whether it was chosen from readings of the machine; False: the user's wish."""


def parse_limit(text: str) -> int | float:
    """A limit as bytes (int), or as a share of the machine's memory (float, above 0, at most 1).

    GB and MB are 10**9 and 10**6 bytes, GiB and MiB 2**30 and 2**20; `70%` is a share.

    Raises: ConfigError when it is none of these, is 0, or is more than 100 %.
    """
    found = re.fullmatch(LIMIT_FORM, text)
    if not found:
        raise ConfigError(
            f"memory.limit is {text!r}; it must be a size or a share, such as 6GB, 600MiB or 70%."
        )
    number, unit = Decimal(found[1]), found[2].upper()
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(f"memory.limit is {text!r}; a share is above 0% and at most 100%.")
        return float(number / 100)
    size = int(number * UNITS[unit])
    if size < 1:
        raise ConfigError(f"memory.limit is {text!r}; it must be above 0. Name more, as in 6GB.")
    return size


def write_limit(size: int) -> str:
    """A number of bytes as `parse_limit` reads it, rounded up to whole megabytes."""
    return f"{-(-size // 10**6)}MB"


def memory_limit(wish: str | None, machine: Machine, held: int = 0) -> Limit:
    """The limit for MLX's active and cached memory on this machine.

    wish: `memory.limit` of the settings. A size is the limit as it is; a share is of the machine's
    memory, or of its container's where that is less.
    held: bytes that MLX's active and cached memory had when the machine was read. They may be held
    on, so a run may ask again in its middle.

    Raises: ConfigError when the wish cannot be read, is more than the machine has, or is a share of
    a memory that is unknown.
    """
    if wish is not None:
        return _wished(wish, machine)
    if machine.device == "metal":
        return _on_metal(machine, held)
    return _on_host(machine, held)


def show(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


def _wished(wish: str, machine: Machine) -> Limit:
    size = parse_limit(wish)
    ceilings = [(machine.total_bytes, "machine"), (_container_limit(machine), "container")]
    known = [(ceiling, name) for ceiling, name in ceilings if ceiling is not None]
    total, place = min(known, default=(None, "machine"))
    if isinstance(size, float):
        if total is None:
            raise ConfigError(
                f"memory.limit is {wish!r}, a share, but this machine's memory cannot be read. "
                "Name a size, as in --memory-limit 6GB."
            )
        reason = f"memory.limit: {wish} of this {place}'s {show(total)}"
        return Limit(int(size * total), reason, from_machine=False)
    if total is not None and size > total:
        raise ConfigError(
            f"memory.limit is {wish!r}, but this {place} has {show(total)} ({total} bytes) in all. "
            "Name less, or leave it out."
        )
    return Limit(size, f"memory.limit: {wish}", from_machine=False)


def _on_metal(machine: Machine, held: int) -> Limit:
    """The least of three: most of what Metal recommends, what is free, what the system leaves."""
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
        (available + held, f"what is available of {show(total)}"),
        (
            total - reserve - own,
            f"{show(total)} in all, less {show(reserve)} for the system and {show(own)} that this "
            "process holds beside MLX",
        ),
    )


def _on_host(machine: Machine, held: int) -> Limit:
    left = machine.container_bytes if machine.device != "cuda" else None
    what = {"available memory": machine.available_bytes, "what is left to this container": left}
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
