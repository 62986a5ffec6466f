"""`localrl init` as a user meets it: what it writes trains, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from waiting import DEADLINE_S

FILES = {"README.md", "data.jsonl", "rewards.py", "train.toml"}


def localrl(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "localrl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100"},
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_it_writes_trains_as_it_stands(tmp_path):
    done = localrl("init", "first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "first"
    assert set(contents(folder)) == FILES
    assert "cd first" in done.stdout
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    for row in rows:
        assert sum(map(int, row["prompt"].split()[1:])) == int(row["answer"])
    small = ("--steps", 1, "--set", "task.eval_prompts=2", "--set", "rollout.prompts_per_step=4")
    done = localrl("train", "train.toml", *small, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stderr
    assert (folder / "runs" / "data-1" / "adapter" / "adapters.safetensors").is_file()


def test_the_check_in_its_readme_finds_all_gold_answers_right(tmp_path):
    assert localrl("init", tmp_path, cwd=tmp_path).returncode == 0
    check = "tasks check data.jsonl --reward rewards.py:right"
    assert f"    localrl {check}\n" in (tmp_path / "README.md").read_text()
    done = localrl(*check.split(), cwd=tmp_path)
    assert "gold answers: 174 of 174 score 1" in done.stdout, done.stderr


@pytest.mark.parametrize("there", ["train.toml", ".hidden"])
def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, there):
    (tmp_path / there).write_text("mine")
    done = localrl("init", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert contents(tmp_path) == {there: b"mine"}


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = localrl("init", "file/first", cwd=tmp_path)
    assert done.returncode == 2
    assert "Cannot write to file/first" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_written_completely_is_not_written(tmp_path):
    """A limit on the size of files, below that of the data: three files fit, the last does not."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import resource, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
            "from localrl.cli.main import main\n"
            "main(['init', 'first'])",
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2
    assert "Cannot write to first" in done.stderr
    assert not list(tmp_path.iterdir())
