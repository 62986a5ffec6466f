"""The checks that a Mac's run of the demonstration goes through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "check_demonstration.py"


def check(folder, *, before: float | None = 0.34, after=0.95, gaps=(0.001, None, 0.009)):
    folder.mkdir()
    base = None if before is None else {"pass@1": before}
    (folder / "eval.json").write_text(json.dumps({"base": base, "adapter": {"pass@1": after}}))
    lines = [{"step": n, "sampling/sampling_logp_difference/mean": g} for n, g in enumerate(gaps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("found", "status", "line"),
    [
        ({}, 0, "| pass@1 after training | 0.9500 | at least 0.9 | ok |"),
        ({"after": 0.89}, 1, "| pass@1 after training | 0.8900 | at least 0.9 | FAIL |"),
        ({"gaps": (0.001, 0.02)}, 1, "largest step | 0.0200 | below 0.01 | FAIL |"),
        ({"before": 0.6}, 1, "| pass@1 before | 0.6000 | below 0.5 | FAIL |"),
        ({"gaps": (None,)}, 2, "largest step | missing | below 0.01 | FAIL |"),
        ({"before": None}, 2, "| pass@1 before | missing | below 0.5 | FAIL |"),
    ],
)
def test_values_beside_their_limits(tmp_path, found, status, line):
    done = check(tmp_path / "run", **found)
    assert done.returncode == status, done.stderr
    assert line in done.stdout


def test_a_run_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is not a finished run" in done.stderr
