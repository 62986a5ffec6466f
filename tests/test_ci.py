"""The workflow for hosted machines, and what its jobs that may fail tell."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
REPORT = ROOT / ".ci" / "report"
JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
MAY_FAIL = {name: job for name, job in JOBS.items() if job.get("continue-on-error")}


def steps(job) -> dict[str, str]:
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step and "name" in step}


def test_the_jobs_without_a_gpu_must_pass():
    assert set(JOBS) - set(MAY_FAIL) == {"linux", "macos-cpu"}
    assert JOBS["macos-cpu"]["env"] == {"LOCALRL_DEVICE": "cpu"}
    assert "pytest -n auto" in steps(JOBS["macos-cpu"])["All tests on the CPU"]


@pytest.mark.parametrize("name", MAY_FAIL)
def test_a_job_that_may_fail_tells_of_it(name):
    for title, command in steps(MAY_FAIL[name]).items():
        assert title == "Install" or command.startswith(".ci/report ")


@pytest.mark.parametrize("name", JOBS)
def test_what_a_job_runs_is_there(name):
    told = "\n".join(step["run"] for step in JOBS[name]["steps"] if "run" in step)
    paths = set(re.findall(r"(?<![\w./-])(?:\.ci|tests|benchmarks)/[\w/.-]+", told))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


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
