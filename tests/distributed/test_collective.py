"""Collectives between real processes, and what is left of them when one of those goes."""

from __future__ import annotations

import signal

import pytest
import together
from waiting import DEADLINE_S

CHILD = str(together.TESTS / "distributed" / "collectives_child.py")


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_and_numbers(tmp_path, size):
    for told in together.run(tmp_path, size, [CHILD, "well"]):
        assert "all is well" in told


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "the death of rank 2 ("),
        ("raise", "something of this rank's own"),
        ("sleep", "the silence of rank 2 ("),
    ],
)
def test_when_one_goes_the_others_say_why(tmp_path, how, words):
    processes = together.start(tmp_path, 3, [CHILD, how])
    try:
        codes = [process.wait(DEADLINE_S) for process in processes[:2]]
    finally:
        together.kill(processes)
    for rank, code in enumerate(codes):
        told = together.said(tmp_path, rank)
        assert words in told, told
        assert code in (0, 75)  # it stopped, or hung in a collective and was ended


def test_a_rank_killed_before_mlx_has_met_it_holds_the_others_for_a_while_only(tmp_path):
    processes = together.start(tmp_path, 2, [CHILD, "early"])
    codes = together.ends(processes)
    assert codes == [1, -signal.SIGKILL]
    assert "in _group" in together.said(tmp_path, 0)
