"""`.ci/report`: what a job that may fail tells a workflow's summary."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / ".ci" / "report"


@pytest.mark.parametrize(("code", "told"), [(0, "passed"), (3, "failed with 3")])
def test_the_exit_code_and_the_end_of_the_output_are_told(tmp_path, code, told):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    script = f"seq 100; echo problem >&2; exit {code}"
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": str(summary)}
    command = [str(REPORT), "A title", "sh", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.splitlines()[0] == "1", "the whole output, also to the log"
    lines = summary.read_text().splitlines()
    assert lines[:4] == ["before", f"### A title: {told}", "", "```"]
    assert lines[4] == "42", "sixty lines"
    assert lines[-2:] == ["problem", "```"]

    del environment["GITHUB_STEP_SUMMARY"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["problem", "```"]
