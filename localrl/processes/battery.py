"""Reads the power source, and keeps a Mac awake while it is on mains power."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOW = 30
"""Percent of battery charge below which a run on battery pauses."""
CAFFEINATE = ("caffeinate", "-i", "-s", "-w")
"""Command that keeps a Mac awake while a process lives; never `-d`: the display may sleep."""


@dataclass(frozen=True)
class Power:
    """One reading of the power source."""

    on_battery: bool
    """True also if a UPS provides the power, as during an outage."""
    percent: int | None
    """Charge of the battery; None if there is no battery, or it reports no charge."""

    @property
    def low(self) -> bool:
        """True if a run should wait until the battery is charged."""
        return self.on_battery and self.percent is not None and self.percent < LOW


def read_power() -> Power | None:
    """Read the current power source; None if it cannot be determined."""
    if sys.platform != "darwin":
        return read_supplies(Path("/sys/class/power_supply"))
    try:
        told = subprocess.run(
            ["pmset", "-g", "batt"],
            capture_output=True,
            text=True,
            errors="replace",  # a UPS may have any name
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_pmset(told.stdout)


def parse_pmset(text: str) -> Power | None:
    """Parse the output of macOS's `pmset -g batt`: the source, then a line for each battery or UPS.

    The internal battery's charge counts, or else a UPS's.
    """
    source = re.search(r"drawing from '([^']+)'", text)
    if source is None:
        return None
    percent = re.search(r"InternalBattery.*?(\d+)%", text) or re.search(r"\t(\d+)%", text)
    return Power(source[1] != "AC Power", int(percent[1]) if percent else None)


def read_supplies(folder: Path) -> Power | None:
    """Read the files that Linux keeps for each power supply; None without a battery."""
    for supply in sorted(folder.glob("*")):
        # The batteries of mice and keyboards have the scope Device.
        if _read(supply / "type") == "Battery" and _read(supply / "scope") != "Device":
            charge = _read(supply / "capacity")
            percent = int(charge) if charge.isdecimal() else None
            return Power(_read(supply / "status") == "Discharging", percent)
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


class Awake:
    """Keeps a Mac awake for one process while it is on mains power."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        default = CAFFEINATE if sys.platform == "darwin" else None
        self._command = command or default
        self._process: subprocess.Popen[bytes] | None = None

    def update(self, power: Power | None, pid: int) -> None:
        """Start or end the command for a new reading; it never starts while the power is
        unknown."""
        wanted = power is not None and not power.on_battery
        if not wanted:
            self.end()
        elif self._process is None and self._command:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    [*self._command, str(pid)], stdin=subprocess.DEVNULL, start_new_session=True
                )

    def end(self) -> None:
        """Let the Mac sleep again."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
