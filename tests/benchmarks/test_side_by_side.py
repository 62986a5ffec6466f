"""What the comparison with other tools computes from its measurements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))

import common
import side_by_side
import side_by_side_page
import to_target


def run(tool, seconds, *, job="short", blas=False, peak=100, problem=None, round=0):
    return {
        "tool": tool,
        "job": job,
        "blas": blas,
        "round": round,
        "wall_s": 1.0,
        "peak_bytes": peak * 2**20,
        "load": 0.5,
        "problem": problem,
        "seconds": seconds,
        "tokens": [512] * len(seconds),
        "counts": [{"decode_calls": 63}] * len(seconds),
        "versions": {tool: "1.0"},
    }


RESULTS = [
    run("localrl", [9.0, 1.0, 2.0]),
    run("localrl", [9.0, 3.0, 1.0], round=1),
    run("TRL", [5.0, 3.0, 3.0], peak=400),
    run("Unsloth MLX", [5.0, 30.0]),
    run("Unsloth MLX", [5.0, 6.0, 4.0], blas=True),
    run("mlx-tune", [], problem="it broke"),
]


def test_the_first_step_of_each_process_does_not_count():
    [ours, trl, unsloth, broken] = side_by_side_page.lines(RESULTS, "short", False)
    # 1, 2, 3, 1 without the two first steps; the rounds' own medians are 1.5 and 2.
    assert (ours.step_s, ours.low_s, ours.high_s, ours.rounds) == (1.5, 1.5, 2.0, 2)
    assert ours.tokens_per_s == pytest.approx(512 / 1.5)
    assert (trl.tool, trl.step_s) == ("TRL", 3.0)
    assert (unsloth.tool, unsloth.step_s) == ("Unsloth MLX", 30.0)
    assert broken.problem == "it broke"


def test_tools_with_a_blas_of_their_own_stand_in_both_tables():
    with_blas = side_by_side_page.lines(RESULTS, "short", True)
    assert [(line.tool, line.step_s) for line in with_blas] == [
        ("localrl", 1.5),
        ("TRL", 3.0),
        ("Unsloth MLX", 5.0),
    ]
    assert side_by_side_page.lines(RESULTS, "long", True) == []


def test_the_page_says_the_ratios(tmp_path, monkeypatch):
    found = side_by_side_page.lines(RESULTS, "short", False)
    table = side_by_side_page.table(found)
    assert "| TRL | 3.00 | 2.00 | 3.00 to 3.00 (1) | 171 | 400 | 4.00 |" in table  # beside 1 and 2
    assert "| mlx-tune | failed: it broke |" in table
    said = side_by_side_page.sentence(found)
    assert "TRL's step takes 2.0 times" in said
    assert "Unsloth MLX) 20.0 times" in said
    about = {"machine": "a test", "cores": 2, "started": "2026-01-01"}
    page = side_by_side_page.page(RESULTS, about, ["more"])
    assert "A prompt of 20 tokens, as installed" in page
    assert page.endswith("more\n")


def test_slow_measurements_come_in_some_rounds_only():
    tools = list(side_by_side.TOOLS[:3])
    first, second = (side_by_side.plan(tools, ["short", "long"], n, 4, 1) for n in (0, 1))
    assert [(m.tool.name, m.job, m.blas, m.steps) for m in second] == [
        ("localrl", "short", False, 4),
        ("TRL", "short", False, 4),
        ("Unsloth MLX", "short", True, 4),
        ("Unsloth MLX", "short", False, 2),
        ("localrl", "long", False, 4),
        ("TRL", "long", False, 4),
        ("Unsloth MLX", "long", True, 4),
    ]
    assert [m for m in first if m not in second] == [
        side_by_side.Measurement(tools[2], "long", False, 2)
    ]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="memory is read in /proc")
def test_the_memory_of_children_counts():
    # A child of a child that holds 64 MB, and says so before it waits for the end of its input.
    inner = "import sys; x = bytearray(64 << 20); print(1, flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        whole = side_by_side.tree_bytes(os.getpid())
        below = side_by_side.tree_bytes(child.pid)
        assert below > 64 << 20
        assert whole > below
    finally:
        child.communicate()


def test_the_target_is_the_mean_of_the_last_completions():
    job = common.Job("", "", "", steps=1, group=2, tokens=8, max_length=16, target=0.9)
    record = common.Record({})
    record.rewards = [0.0] * 50 + [1.0] * 115
    record.seconds = [2.0, 3.0]
    assert not record.check(job)  # 115 of 128
    record.rewards.append(1.0)
    assert record.check(job)  # 116: 0.906
    record.seconds.append(4.0)
    record.rewards += [0.0] * 100
    assert record.check(job)  # once there, it stays so
    assert record.reached_s == 5.0


def test_rewards_of_the_runners():
    assert common.even("w2 w3 w4 nothing") == pytest.approx(2 / 3)
    assert common.even("") == 0.0
    job = common.Job("", "", "", steps=1, group=2, tokens=8, max_length=16, target=0.9)
    assert common.score(job, ["1;#12", "12", "#1#12 "], ["12", "12", "12"]) == [1.0, 0.0, 1.0]


def test_a_tool_is_judged_by_its_best_rate():
    def tried(way, rate, reached):
        return {
            "way": way,
            "rate": rate,
            "reached_s": reached,
            "tokens": 1000,
            "wall_s": 20.0,
            "last_reward": 0.5,
            "limit_s": 60.0,
        }

    results = [
        *(tried("localrl", 1e-3, s) for s in (10.0, 20.0, 30.0)),
        *(tried("localrl", 1e-2, s) for s in (None, None, 5.0)),
        *(tried("TRL", 1e-3, s) for s in (None, None, 90.0)),
        *(tried("TRL", 1e-2, s) for s in (50.0, 60.0, None)),
        tried("other", 1e-3, None),
    ]
    text = to_target.section(results)
    assert "| localrl | 0.001 | 20 | 10, 20, 30 | 1.0 | 1,000 | 20 |" in text
    assert "| TRL | 0.01 | 60 | 50, 60, never | 3.0 | 1,000 | 20 |" in text
    assert "The quickest of them as it comes takes 3.0 times as long." in text
    assert "| other | 0.001 | not reached, at most 0.50 |" in text
