"""The limit: how it is written, and what is chosen on machines of known memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localrl.errors import ConfigError
from localrl.memory.limit import (
    LATER,
    SPREAD,
    Limit,
    memory_limit,
    parse_limit,
    show,
    write_limit,
)
from localrl.memory.machine import Machine, mac

GIB = 2**30
LINUX = Machine(
    "Linux", "cpu", total_bytes=16 * GIB, available_bytes=10 * GIB, resident_bytes=GIB // 2
)
CONTAINER = replace(LINUX, container_limit_bytes=8 * GIB, container_bytes=5 * GIB)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("6GB", 6_000_000_000),
        ("6GiB", 6_442_450_944),
        ("600MB", 600_000_000),
        ("600MiB", 629_145_600),
        ("1.1 gb", 1_100_000_000),
        ("70%", 0.7),
        ("100 %", 1.0),
        ("12.5%", 0.125),
    ],
)
def test_what_is_read(text, found):
    assert parse_limit(text) == found
    assert isinstance(parse_limit(text), type(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6", "must be a size or a share"),
        ("6G", "must be a size or a share"),
        ("-6GB", "must be a size or a share"),
        ("1e9GB", "must be a size or a share"),
        ("", "must be a size or a share"),
        ("0GB", "must be above 0"),
        ("0.0000001MB", "must be above 0"),
        ("0%", "above 0% and at most 100%"),
        ("101%", "above 0% and at most 100%"),
    ],
)
def test_what_is_not(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_limit(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("size", [1, 999_999, 1_000_000, 1_000_001, 6_442_450_944])
def test_a_limit_that_is_written_down_is_read_as_at_least_itself(size):
    again = parse_limit(write_limit(size))
    assert size <= again < size + 10**6


def test_sizes_for_people():
    assert show(5_460_000_000) == "5.5 GB"
    assert show(999_999_999) == "1000 MB"


BESIDE = LINUX.resident_bytes + LATER  # pyright: ignore


def test_a_wish_is_for_the_process_and_mlx_gets_the_rest():
    """The process holds half a GiB, and a little more later."""
    assert memory_limit("6GB", LINUX) == Limit(
        6_000_000_000 - BESIDE,
        "memory.limit: 6GB, minus 601 MB for the process besides MLX's arrays",
        False,
        BESIDE + SPREAD,
    )
    # More than is available: the user may know what will be free by then.
    assert memory_limit("12GiB", LINUX).bytes == 12 * GIB - BESIDE
    assert memory_limit("16GiB", LINUX).bytes == 16 * GIB - BESIDE
    assert memory_limit("6GB", Machine("Linux", "cpu")).bytes == 6_000_000_000 - LATER
    assert memory_limit("100MB", LINUX).bytes == 0


def test_a_share_is_of_the_total_or_of_a_smaller_container():
    found = memory_limit("50%", LINUX)
    assert found.bytes == 8 * GIB - BESIDE
    assert found.reason.startswith("memory.limit: 50% of this machine's 17.2 GB, minus 601 MB")
    found = memory_limit("50%", CONTAINER)
    assert found.bytes == 4 * GIB - BESIDE
    assert found.reason.startswith("memory.limit: 50% of this container's 8.6 GB, minus")
    roomy = replace(CONTAINER, container_limit_bytes=99 * GIB)
    assert memory_limit("50%", roomy).bytes == 8 * GIB - BESIDE


def test_mlx_arrays_are_not_subtracted_twice():
    """What is resident holds them too, so the same setting gives the same limit later."""
    later = replace(LINUX, resident_bytes=5 * GIB // 2)
    assert memory_limit("6GB", later, held=2 * GIB) == memory_limit("6GB", LINUX)
    # Shared and unread pages: MLX's count may even be larger.
    assert memory_limit("6GB", LINUX, held=2 * GIB).bytes == 6_000_000_000 - LATER


@pytest.mark.parametrize("wish", [None, "2GB"])
def test_a_setting_that_is_named_leaves_mlx_what_it_needs(wish):
    """Also at a start that holds a little more."""
    named = memory_limit(wish, LINUX).setting(3 * GIB)
    more = replace(LINUX, resident_bytes=GIB // 2 + SPREAD)
    assert memory_limit(write_limit(named), more).bytes >= 3 * GIB  # pyright: ignore


def test_a_wish_above_the_total_names_both():
    with pytest.raises(ConfigError) as caught:
        memory_limit("17GiB", LINUX)
    assert "'17GiB'" in str(caught.value)
    assert "17179869184 bytes" in str(caught.value)
    with pytest.raises(ConfigError, match=r"this container has 8\.6 GB"):
        memory_limit("9GiB", CONTAINER)


def test_a_share_of_an_unknown_memory_is_an_error():
    with pytest.raises(ConfigError, match="Give a size"):
        memory_limit("50%", Machine("Linux", "cpu"))


def test_linux_leaves_a_fifth_of_what_is_free():
    found = memory_limit(None, LINUX)
    assert found.bytes == 8 * GIB
    assert found.from_machine
    assert found.reason == "80 % of available memory, 10.7 GB"


def test_what_is_left_to_a_container_counts_where_it_is_less():
    found = memory_limit(None, CONTAINER)
    assert found.bytes == 4 * GIB
    assert "left to this container" in found.reason
    roomy = replace(CONTAINER, container_bytes=12 * GIB)
    assert memory_limit(None, roomy).bytes == 8 * GIB
    alone = replace(CONTAINER, available_bytes=None)
    assert memory_limit(None, alone).bytes == 4 * GIB


def test_what_mlx_holds_may_be_held_on():
    """Reading again after MLX took 2 GiB gives the same limit as before."""
    later = replace(LINUX, available_bytes=8 * GIB, resident_bytes=5 * GIB // 2)
    assert memory_limit(None, later, held=2 * GIB) == memory_limit(None, LINUX)
    small = mac(8)
    assert small.available_bytes is not None
    assert small.resident_bytes is not None
    later = replace(
        small,
        available_bytes=small.available_bytes - GIB,
        resident_bytes=small.resident_bytes + GIB,
    )
    assert memory_limit(None, later, held=GIB) == memory_limit(None, small)


@pytest.mark.parametrize(
    ("total", "size", "reason"),
    [
        # 8 GiB less 4 GiB for the system, less the half GiB of the process.
        (8, 7 * GIB // 2, "8.6 GB in total, minus 4.3 GB for the system and 537 MB that this"),
        # 0.8 of 2/3 of the memory; from 64 GiB on of 3/4.
        (16, 9_162_596_897, "80 % of the 11.5 GB that Metal recommends"),
        (24, 13_743_895_347, "80 % of the 17.2 GB that Metal recommends"),
        (64, 41_231_686_041, "80 % of the 51.5 GB that Metal recommends"),
        (128, 82_463_372_083, "80 % of the 103.1 GB that Metal recommends"),
    ],
)
def test_fresh_macs(total, size, reason):
    """Three quarters of their memory is available, as after a start."""
    found = memory_limit(None, replace(mac(total), available_bytes=total * GIB * 3 // 4))
    assert (found.bytes, found.from_machine) == (size, True)
    assert found.reason.startswith(reason)


@pytest.mark.parametrize("total", [8, 16, 24, 64, 128])
def test_used_macs(total):
    """3/8 of the memory is available."""
    found = memory_limit(None, mac(total))
    assert found.bytes == total * GIB * 3 // 8
    assert found.reason.startswith("the available memory, out of")


def test_a_mac_that_is_full_of_other_programs():
    full = replace(mac(16), available_bytes=3 * GIB)
    found = memory_limit(None, full)
    assert (found.bytes, found.reason) == (3 * GIB, "the available memory, out of 17.2 GB")


def test_larger_macs_keep_more_for_the_system():
    much = 99 * GIB
    raised = {"recommended_bytes": much, "available_bytes": much, "resident_bytes": None}
    assert memory_limit(None, replace(mac(16), **raised)).bytes == 12 * GIB
    assert memory_limit(None, replace(mac(24), **raised)).bytes == 18 * GIB


def test_a_limit_is_never_below_nothing():
    tiny = Machine("Darwin", "metal", 2 * GIB, GIB, GIB, GIB)
    assert memory_limit(None, tiny).bytes == 0


def test_readings_that_are_unknown_limit_nothing():
    found = memory_limit(None, Machine("Linux", "cpu"))
    assert (found.bytes, found.reason) == (None, "available memory cannot be read")
    found = memory_limit(None, replace(mac(16), recommended_bytes=None, available_bytes=None))
    assert found.bytes is None
    assert found.reason == ("Metal's recommended working set and available memory cannot be read")


def test_a_gpus_memory_is_not_the_containers():
    gpu = replace(CONTAINER, device="cuda", total_bytes=80 * GIB, available_bytes=70 * GIB)
    assert memory_limit(None, gpu).bytes == 56 * GIB
    assert memory_limit("50%", gpu).bytes == 40 * GIB  # Python is in the host's memory
