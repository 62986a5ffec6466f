"""Readings of the Mac that the tests run on, by its real commands; what is parsed elsewhere from
samples (`mac_samples`) is plausible here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from waiting import until

from localrl import backend
from localrl.memory.machine import read_machine, resident_bytes
from localrl.processes.battery import Awake, Power, read_power
from localrl.processes.heartbeat import Heartbeat
from localrl.rewards.code import check_code_rewards

pytestmark = pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS and its commands")

GIB = 2**30


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def test_the_memory_of_this_mac():
    machine = read_machine()
    total = int(told("sysctl", "-n", "hw.memsize"))
    assert (machine.system, machine.total_bytes) == ("Darwin", total)
    assert machine.available_bytes is not None
    assert total / 1000 < machine.available_bytes < total
    assert machine.swap_used_bytes is not None
    assert 0 <= machine.swap_used_bytes < 1024 * GIB
    assert machine.pressure in ("normal", "warn", "critical")
    assert (machine.recommended_bytes is None) == (machine.device == "cpu")


def test_pages_add_up_to_the_memory():
    """Else vm_stat has a kind of pages that is not known here."""
    text = told("vm_stat")
    pages = dict(re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.$", text, re.MULTILINE))
    kinds = ("free", "active", "inactive", "speculative", "wired down", "occupied by compressor")
    size = int(told("sysctl", "-n", "hw.pagesize"))
    total = int(told("sysctl", "-n", "hw.memsize"))
    assert 0.85 * total < size * sum(int(pages[kind]) for kind in kinds) <= total


def test_the_footprint_is_about_what_ps_says():
    """ps counts pages in memory, the footprint also compressed ones, and no shared libraries."""
    held = resident_bytes()
    assert held is not None
    block = bytearray(os.urandom(1 << 20)) * 200  # not compressible as a whole page of zeros is
    more = resident_bytes()
    assert more is not None
    assert 0.9 * len(block) < more - held < 1.5 * len(block)
    assert more < 10 * 1024 * int(told("ps", "-o", "rss=", "-p", str(os.getpid())))


def test_the_power_source_is_read():
    power = read_power()
    assert power is not None, told("pmset", "-g", "batt")
    assert power.on_battery == ("'AC Power'" not in told("pmset", "-g", "batt"))
    assert power.percent is None or 0 <= power.percent <= 100


def test_the_mac_is_kept_awake_and_let_go():
    awake = Awake()
    awake.update(Power(on_battery=False, percent=None), os.getpid())
    try:
        assert awake._process is not None
        until(lambda: f"pid {awake._process.pid}(caffeinate)" in told("pmset", "-g", "assertions"))
        assert "PreventUserIdleDisplaySleep named" not in "".join(
            line
            for line in told("pmset", "-g", "assertions").splitlines()
            if f"pid {awake._process.pid}(" in line
        ), "the display may sleep"
    finally:
        awake.end()


def test_the_sandbox_proves_itself():
    assert "programs run in sandbox-exec" in check_code_rewards()


def test_the_clocks_agree_while_the_mac_is_awake():
    slept = []
    heartbeat = Heartbeat()
    heartbeat.on_sleep = slept.append
    heartbeat.beat()
    heartbeat.beat()
    assert slept == []


def test_the_device_is_the_one_asked_for():
    wanted = os.environ.get("LOCALRL_DEVICE") or "auto"
    assert backend.describe().device == ("cpu" if wanted == "cpu" else "metal")
