"""What is read of a machine's memory: from Linux's files, from a Mac's commands, and nothing."""

from __future__ import annotations

import re
import struct
import sys

import mac_samples
import pytest

from localrl.memory.machine import (
    Machine,
    available_in,
    footprint_in,
    mac,
    read_machine,
    resident_bytes,
    run_command,
)

MIB, GIB = 2**20, 2**30

MEMINFO = """\
MemTotal:       16384000 kB
MemFree:         1024000 kB
MemAvailable:    8192000 kB
SwapTotal:       2048000 kB
SwapFree:        1536000 kB
HugePages_Total:       0
"""
CALM = """\
some avg10=71.30 avg60=12.05 avg300=2.99 total=1823094
full avg10=0.00 avg60=0.00 avg300=0.00 total=0
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                          200000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                           4000.
"Translation faults":                 804122011.
Pages copy-on-write:                   31044712.
Pages zero filled:                    402077153.
Pages reactivated:                     19377012.
Pages purged:                           2301992.
File-backed pages:                       120000.
Anonymous pages:                         383000.
Pages stored in compressor:              410000.
Pages occupied by compressor:            160000.
Decompressions:                        50211873.
Compressions:                          61120094.
Pageins:                               11873220.
Pageouts:                                 51290.
Swapins:                                 600012.
Swapouts:                                812345.
"""
SYSCTL = """\
hw.memsize: 17179869184
kern.memorystatus_vm_pressure_level: 2
vm.swapusage: total = 2048.00M  used = 1034.25M  free = 1013.75M  (encrypted)
"""
METAL = {
    "device_name": "Apple M2",
    "architecture": "applegpu_g14g",
    "memory_size": 17179869184,
    "max_recommended_working_set_size": 12713115648,
    "max_buffer_length": 9534832640,
    "resource_limit": 499000,
}


def linux(root, files, device="cpu", info=None):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_machine(
        system="Linux", device=device, info=info or {}, root=root, resident=lambda: 300 * MIB
    )


def on_mac(*, sysctl: str | None = SYSCTL, vm_stat: str | None = VM_STAT, info=METAL):
    told = {"sysctl": sysctl, "vm_stat": vm_stat}
    return read_machine(
        system="Darwin",
        device="metal",
        info=info,
        run=lambda command: told[command[0]],
        resident=lambda: None,
    )


def test_linux_without_a_container(tmp_path):
    files = {"proc/meminfo": MEMINFO, "proc/pressure/memory": CALM, "proc/self/cgroup": "0::/\n"}
    assert linux(tmp_path, files) == Machine(
        system="Linux",
        device="cpu",
        total_bytes=16_384_000 * 1024,
        available_bytes=8_192_000 * 1024,
        swap_used_bytes=512_000 * 1024,
        pressure="normal",
        resident_bytes=300 * MIB,
    )


def test_nothing_can_be_read(tmp_path):
    nothing = read_machine(
        system="Linux", device="cpu", info={}, root=tmp_path, resident=lambda: None
    )
    assert nothing == Machine("Linux", "cpu")
    assert on_mac(sysctl=None, vm_stat=None, info={}) == Machine("Darwin", "metal")


def test_a_container_of_version_2(tmp_path):
    machine = linux(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.high": "max\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB // 2}\nslab 99\n",
        },
    )
    assert machine.container_limit_bytes == 4 * GIB
    assert machine.container_bytes == 4 * GIB - (3 * GIB - GIB // 2)


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    """The parent is tighter in what is left, the group's own memory.high in what it allows."""
    groups = "sys/fs/cgroup/user.slice"
    machine = linux(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/run.scope\n",
            f"{groups}/memory.max": f"{8 * GIB}\n",
            f"{groups}/memory.current": f"{7 * GIB}\n",
            f"{groups}/run.scope/memory.max": "max\n",
            f"{groups}/run.scope/memory.high": f"{5 * GIB}\n",
            f"{groups}/run.scope/memory.current": f"{2 * GIB}\n",
        },
    )
    assert (machine.container_limit_bytes, machine.container_bytes) == (5 * GIB, GIB)


VERSION_1 = "9:name=systemd:/\n5:cpuset:/\n4:memory:/docker/0123abc\n0::/\n"


@pytest.mark.parametrize("inside", ["", "/docker/0123abc"])
def test_a_container_of_version_1(tmp_path, inside):
    """Seen from inside, the path is the host's, and the mount is the container's own group."""
    group = f"sys/fs/cgroup/memory{inside}"
    machine = linux(
        tmp_path,
        {
            "proc/self/cgroup": VERSION_1,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            f"{group}/memory.limit_in_bytes": f"{2 * GIB}\n",
            f"{group}/memory.usage_in_bytes": f"{GIB}\n",
            f"{group}/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 4}\n",
        },
    )
    assert machine.container_limit_bytes == 2 * GIB
    assert machine.container_bytes == 2 * GIB - (GIB - GIB // 4)


def test_version_1_without_a_limit(tmp_path):
    files = {
        "proc/self/cgroup": VERSION_1,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
    machine = linux(tmp_path, files)
    assert (machine.container_limit_bytes, machine.container_bytes) == (None, None)


def test_a_group_above_its_limit_has_nothing_left(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.high": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
    }
    assert linux(tmp_path, files).container_bytes == 0


def stalls(percent):
    return f"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={percent} avg60=0.00\n"


@pytest.mark.parametrize(
    ("system", "own", "pressure"),
    [
        ("9.99", None, "normal"),
        ("10.00", None, "warn"),
        ("39.99", "1.00", "warn"),
        ("40.00", None, "critical"),
        ("0.00", "12.50", "warn"),
        (None, "50.00", "critical"),
        (None, None, None),
    ],
)
def test_pressure_on_linux_is_the_worse_of_the_system_and_its_group(
    tmp_path, system, own, pressure
):
    files = {"proc/self/cgroup": "0::/a.slice/b.scope\n", "sys/fs/cgroup/a.slice/x": ""}
    files["sys/fs/cgroup/a.slice/memory.pressure"] = stalls("77.00")  # a parent's is not ours
    files["sys/fs/cgroup/a.slice/b.scope/x"] = ""
    if system:
        files["proc/pressure/memory"] = stalls(system)
    if own:
        files["sys/fs/cgroup/a.slice/b.scope/memory.pressure"] = stalls(own)
    assert linux(tmp_path, files).pressure == pressure


def test_on_cuda_total_and_available_are_the_gpus(tmp_path):
    info = {"total_memory": 80 * GIB, "free_memory": 70 * GIB}
    machine = linux(tmp_path, {"proc/meminfo": MEMINFO}, device="cuda", info=info)
    assert (machine.total_bytes, machine.available_bytes) == (80 * GIB, 70 * GIB)


def test_a_mac():
    assert on_mac() == Machine(
        system="Darwin",
        device="metal",
        total_bytes=17179869184,
        available_bytes=(10000 + 200000 + 3000) * 16384,
        recommended_bytes=12713115648,
        largest_buffer_bytes=9534832640,
        swap_used_bytes=1034 * MIB + MIB // 4,
        pressure="warn",
    )


def test_the_commands_of_a_mac_are_run(tmp_path, monkeypatch):
    for name, text in {"sysctl": SYSCTL, "vm_stat": VM_STAT}.items():
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n/bin/echo $LC_ALL $@ >{tmp_path}/{name}.given\n")
        script.write_text(script.read_text() + f"/bin/cat <<'END'\n{text}END\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = read_machine(system="Darwin", device="metal", info=METAL, resident=lambda: None)
    assert found == on_mac()
    given = (tmp_path / "sysctl.given").read_text()
    assert given == "C hw.memsize kern.memorystatus_vm_pressure_level vm.swapusage\n"


def test_what_one_sysctl_does_not_know_leaves_the_others(tmp_path):
    lines = SYSCTL.splitlines(keepends=True)
    machine = on_mac(sysctl=lines[0] + lines[2])
    assert machine.pressure is None
    assert machine.swap_used_bytes == 1034 * MIB + MIB // 4
    without_total = on_mac(sysctl="")
    assert (without_total.total_bytes, without_total.swap_used_bytes) == (17179869184, None)


@pytest.mark.parametrize(
    ("level", "pressure"), [("1", "normal"), ("2", "warn"), ("4", "critical"), ("3", None)]
)
def test_the_levels_of_a_mac(level, pressure):
    sysctl = f"kern.memorystatus_vm_pressure_level: {level}\n"
    assert on_mac(sysctl=sysctl).pressure == pressure


@pytest.mark.parametrize("of", mac_samples.VM_STAT)
def test_what_vm_stat_says(of):
    sample = mac_samples.VM_STAT[of]
    assert available_in(sample.text) == (sample.free + sample.inactive) * sample.page_bytes


@pytest.mark.parametrize("of", mac_samples.VM_STAT)
def test_purgeable_pages_are_among_the_others(of):
    """The other kinds make up a machine's memory without them, but for some 4 %."""
    sample = mac_samples.VM_STAT[of]
    pages = dict(re.findall(r"^(Pages [a-z ]+):\s+(\d+)\.$", sample.text, re.MULTILINE))
    kinds = ("active", "wired down", "occupied by compressor")
    sum_of_others = sample.free + sample.inactive + sum(int(pages[f"Pages {k}"]) for k in kinds)
    assert 0.9 < sum_of_others / sample.total <= 1


@pytest.mark.parametrize("encrypted", ["", "  (encrypted)"])
@pytest.mark.parametrize("of", mac_samples.SWAP)
def test_what_swapusage_says(of, encrypted):
    text, used = mac_samples.SWAP[of]
    found = on_mac(sysctl=f"vm.swapusage: {text}{encrypted}\n").swap_used_bytes
    assert found == int(used * MIB)
    in_gigabytes = on_mac(sysctl="vm.swapusage: total = 2.00G  used = 1.50G  free = 0.50G\n")
    assert in_gigabytes.swap_used_bytes == 1536 * MIB


def test_pages_of_an_intel_mac_are_smaller():
    assert available_in(VM_STAT.replace("16384", "4096")) == 213_000 * 4096
    assert available_in("vm_stat: command not found") is None
    assert available_in("Mach Virtual Memory Statistics: (page size of 16384 bytes)\n") is None


def test_the_footprint_stands_behind_seven_numbers_and_the_uuid():
    """struct rusage_info_v0: times, wake-ups, page-ins, wired, resident, footprint, start, exit."""
    answer = bytes(16) + struct.pack("=10Q", 1, 2, 3, 4, 5, 6, 7, 5 * GIB, 9, 10)
    assert len(answer) == 96
    assert footprint_in(answer) == 5 * GIB


def test_simulated_macs():
    small, large = mac(16), mac(64)
    assert (small.device, small.total_bytes) == ("metal", 16 * GIB)
    assert small.available_bytes == 6 * GIB
    # 10,922.67 MiB and 8,192 MiB, as an M1 with 16 GiB tells.
    assert small.recommended_bytes == 11_453_246_122
    assert small.largest_buffer_bytes == pytest.approx(8192 * MIB, abs=1)
    assert large.recommended_bytes == 49_152 * MIB
    assert large.largest_buffer_bytes == 36_864 * MIB


def test_commands_that_fail():
    assert run_command(["sh", "-c", "echo a part; exit 1"]) == "a part\n"
    assert run_command(["no-such-command-here"]) is None


def test_this_machine():
    machine = read_machine()
    assert machine.total_bytes is not None
    assert machine.available_bytes is not None
    assert machine.resident_bytes is not None
    assert machine.resident_bytes < machine.total_bytes
    assert machine.available_bytes < machine.total_bytes


def test_what_this_process_holds_is_what_it_holds_now():
    before = resident_bytes()
    assert before is not None
    block = b"x" * (64 * MIB)
    held = resident_bytes()
    assert held is not None
    assert held - before > 50 * MIB
    del block
    after = resident_bytes()
    assert after is not None
    assert held - after > 50 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's file")
def test_a_file_that_does_not_say_what_this_process_holds(tmp_path):
    (tmp_path / "statm").write_text("nonsense")
    assert resident_bytes(tmp_path / "statm") is None
    assert resident_bytes(tmp_path / "none") is None
