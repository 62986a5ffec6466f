"""Run folders as they are found: whole, torn, missing files, and while somebody writes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from localrl.errors import ConfigError
from localrl.report.reading import read_groups, read_groups_at, read_run
from localrl.runs.folder import reopen_run


def test_a_whole_run(tree_run):
    run = read_run(tree_run)
    assert [step["step"] for step in run.steps] == [1, 2]
    assert [score.step for score in run.scores] == [0, 2]
    assert (run.step, run.planned_steps, run.state) == (2, 2, "finished")
    assert run.settings["rollout.strategy"] == "tree"
    assert "model.base_id" not in run.settings
    assert run.plan["max_completion_tokens"] == 24
    assert run.unread == {}


def test_the_interval_is_that_of_eval_json(tree_run):
    closing = json.loads((tree_run / "eval.json").read_text())
    scores = read_run(tree_run).scores
    for score, key in ((scores[0], "base"), (scores[-1], "adapter")):
        assert score.pass_at_1 == closing[key]["pass@1"]
        assert score.interval == pytest.approx(closing[key]["ci95"])


def test_a_torn_last_line_is_left_out_in_silence(run_copy):
    groups = len(list(read_groups(run_copy)))
    for name in ("metrics", "rollouts", "events"):
        path = run_copy / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + b'{"step": 3, "reward": 0.')
    run = read_run(run_copy)
    assert run.step == 2
    assert run.unread == {}
    assert len(list(read_groups(run_copy))) == groups == 16


def test_other_broken_lines_are_counted(run_copy):
    path = run_copy / "metrics.jsonl"
    path.write_bytes(b'{"step": \n[1]\n\xff\n' + path.read_bytes())
    run = read_run(run_copy)
    assert len(run.steps) == 2
    assert run.unread == {"metrics.jsonl": 3}


def test_groups_by_place(run_copy):
    found = list(read_groups(run_copy))
    offsets = [offset for offset, _ in found]
    assert list(read_groups_at(run_copy, offsets[::-1])) == [group for _, group in found][::-1]
    assert list(read_groups_at(run_copy, [1, 10**9])) == [None, None]


def test_a_run_that_has_only_begun(run_copy):
    for path in run_copy.iterdir():
        if path.name != "run.json" and path.is_file():
            path.unlink()
    run = read_run(run_copy)
    assert (run.step, run.scores, run.settings, run.planned_steps) == (0, [], {}, None)
    assert list(read_groups(run_copy)) == []


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no run in .* \(no run\.json\)"):
        read_run(tmp_path)


def test_who_works_in_the_folder(run_copy):
    with reopen_run(run_copy):
        assert read_run(run_copy).state == "running"
        assert "pid" in read_run(run_copy).holder
    assert read_run(run_copy).state == "finished"
    (run_copy / "adapter" / "adapters.safetensors").unlink()
    assert read_run(run_copy).state == "stopped"


def test_a_process_that_is_gone_and_one_elsewhere(run_copy):
    (run_copy / "adapter" / "adapters.safetensors").unlink()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lock = run_copy / ".lock"
    lock.write_text(f"pid {child.pid} on {socket.gethostname()}\n")
    assert read_run(run_copy).state == "stopped"
    lock.write_text(f"pid {child.pid} on another-machine\n")
    assert read_run(run_copy).state == "unknown"


def test_looking_never_turns_a_run_away(run_copy):
    read_run(run_copy)
    with reopen_run(run_copy):
        read_run(run_copy)
