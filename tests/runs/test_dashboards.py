"""Dashboards get numbers, all of them, and nothing else."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from waiting import DEADLINE_S

from localrl import RunConfig, train
from localrl.errors import ConfigError
from localrl.runs import dashboards
from localrl.runs.logs import read_jsonl

RECORD = {"step": 3, "reward": 0.5, "kl": None, "update/applied": True, "bad": math.nan, "t": "x"}


def scalars(folder):
    """(tag, step, value) of all numbers in a folder of event files, and every other tag."""
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    from tensorboardX.proto.event_pb2 import Event

    numbers, others = [], []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    numbers.append((value.tag, event.step, value.simple_value))
                else:
                    others.append(value.tag)
    return numbers, others


def test_tensorboard_gets_the_numbers_of_a_run(tiny_folder, tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    settings = {
        "model.path": str(tiny_folder),
        "run.out": str(tmp_path / "run"),
        "run.report_to": "tensorboard",
        "run.steps": 2,
        "rollout.prompts_per_step": 2,
        "rollout.max_completion_tokens": 6,
        "task.eval_prompts": 2,
    }
    out = train(RunConfig.create(settings)).folder
    numbers, others = scalars(out / "tensorboard")
    expected = [
        (name.replace("@", "_"), line["step"], value)
        for line in read_jsonl(out / "metrics.jsonl")
        for name, value in line.items()
        if name != "step" and value is not None
    ]
    assert [(n, s) for n, s, _ in numbers] == [(n, s) for n, s, _ in expected]
    assert [v for *_, v in numbers] == pytest.approx([float(v) for *_, v in expected], rel=1e-6)
    assert not others
    text = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert str(tmp_path).encode() not in text


def test_steps_that_are_done_again_replace_the_earlier_ones(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    opened = dashboards.start(["tensorboard"], tmp_path, {}, step=2)
    dashboards.log(opened, RECORD, pytest.fail)
    dashboards.finish(opened, pytest.fail)
    assert scalars(tmp_path / "tensorboard")[0] == [("reward", 3, 0.5), ("update/applied", 3, 1.0)]
    from tensorboardX.proto.event_pb2 import SessionLog

    (path,) = (tmp_path / "tensorboard").iterdir()
    assert bytes([0x10, 3, 0x3A, 2, 0x08, SessionLog.START]) in path.read_bytes()


def test_wandb_keeps_to_the_numbers(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    (tmp_path / "run.json").write_text("{}")
    code = (
        "import sys, pathlib\n"
        "from localrl.runs import dashboards\n"
        "opened = dashboards.start(['wandb'], pathlib.Path(sys.argv[1]), {'run.seed': 7})\n"
        "secret = 'a secret prompt'\n"
        "dashboards.log(opened, {'step': 3, 'reward': 0.5, 'text': secret}, sys.exit)\n"
        "dashboards.finish(opened, sys.exit)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), "a secret argument"]
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*.wandb"))
    assert b"reward" in written
    assert b"run.seed" in written
    assert b"secret" not in written


@pytest.mark.parametrize("names", [["nonsense"], ["wandb", "wandb"]])
def test_unknown_dashboards_are_refused(names):
    with pytest.raises(ConfigError, match="tensorboard and wandb, each once"):
        dashboards.check(names)


def test_a_missing_package_is_named_before_anything_is_written(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    settings = {
        "model.path": str(tiny_folder),
        "run.out": str(tmp_path / "run"),
        "run.report_to": ["tensorboard"],
    }
    with pytest.raises(ConfigError, match=r"pip install 'localrl\[tensorboard\]'"):
        train(RunConfig.create(settings))
    assert not (tmp_path / "run").exists()


def test_a_dashboard_that_breaks_is_told_of_once_and_left_out():
    seen, warned = [], []

    def write(step, numbers):
        seen.append((step, numbers))
        if step == 2:
            raise OSError("no space left")

    one = dashboards.Dashboard("one", write, lambda: seen.append("closed"))
    for step in (1, 2, 3):
        dashboards.log([one], {**RECORD, "step": step}, warned.append)
    dashboards.finish([one], warned.append)
    assert seen == [(n, {"step": n, "reward": 0.5, "update/applied": 1.0}) for n in (1, 2)]
    assert len(warned) == 1
    assert "no space left" in warned[0]


def test_wandb_without_an_account_is_one_clear_error(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    (tmp_path / "run.json").write_text("{}")
    code = (
        "import sys, pathlib\n"
        "from localrl.errors import ConfigError\n"
        "from localrl.runs import dashboards\n"
        "try: dashboards.start(['wandb'], pathlib.Path(sys.argv[1]), {})\n"
        "except ConfigError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE_S,
    )
    assert "wandb cannot be started" in done.stdout
    assert "WANDB_MODE=offline" in done.stdout
