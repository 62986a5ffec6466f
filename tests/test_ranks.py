"""`localrl train` as several processes over MLX's ring: one run, whoever goes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import together
from steps import plan
from test_resuming import PARTS, SMALL
from waiting import DEADLINE_S, until

from localrl.backend import mx
from localrl.config import RunConfig
from localrl.distributed.collective import Ranks
from localrl.errors import ConfigError, RewardError
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.logs import read_jsonl
from localrl.train import train
from localrl.training.setup import _agree_on_plan
from localrl.utils.codec import from_bytes, to_bytes


@pytest.fixture(autouse=True, scope="module")
def reward(tmp_path_factory):
    """One that a random model gets now and then."""
    file = tmp_path_factory.mktemp("rewards") / "reward.py"
    file.write_text(
        "def score(completion_ids, log_metric, **kwargs):\n"
        "    log_metric('called', 1.0)\n"
        "    return [float(sum(ids) % 3 == 0) for ids in completion_ids]\n"
    )
    SETTINGS["task.rewards"] = f"['{file}:score']"


SETTINGS = {**SMALL, "run.steps": 4, "run.checkpoint_every": 1}


def command(model, out, *more, **changes):
    settings = {**SETTINGS, **changes}
    words = [word for k, v in settings.items() for word in ("--set", f"{k}={_toml(v)}")]
    return ["-m", "localrl", "train", "--model", str(model), "--out", str(out), *words, *more]


def _toml(value):
    return str(value).lower() if isinstance(value, bool) else value


def alone(folder, arguments):
    """The same command as one process."""
    path = os.pathsep.join([str(together.TESTS), str(together.TESTS.parent)])
    command = [sys.executable, *arguments, "--no-supervise"]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def metrics(out):
    return [line for line in read_jsonl(out / "metrics.jsonl") if "reward" in line]


def adapter(out):
    weights = mx.load(str(out / "adapter" / "adapters.safetensors"))
    return np.concatenate([np.array(weights[name]).ravel() for name in sorted(weights)])


def wait_for_steps(out: Path, count: int, processes):
    def come():
        assert all(process.poll() is None for process in processes), "a rank has ended"
        return (out / "metrics.jsonl").exists() and len(metrics(out)) >= count

    until(come, f"step {count}")


@pytest.mark.exact
def test_two_ranks_make_the_run_of_one(tiny_folder, tmp_path, engine):
    make_the_run_of_one(tiny_folder, tmp_path, "rounds", engine)


def make_the_run_of_one(tiny_folder, tmp_path, parts, engine="auto"):
    """Two ranks do, with these parts switched on."""
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    changes = PARTS[parts] | {"rollout.prompts_per_step": 4, "model.engine": engine}
    told = together.run(tmp_path, 2, command(tiny_folder, "run", **changes), places)
    alone(tmp_path, command(tiny_folder, "one", **changes))
    out, one = places[0] / "run", tmp_path / "one"

    assert not list(places[1].iterdir())  # rank 0 alone writes
    assert "ranks    2: 0 " in told[0]
    assert "pass@1" in told[0]
    assert told[1] == ""
    [event] = [event for event in read_jsonl(out / "events.jsonl") if event["kind"] == "ranks"]
    assert len(event["names"]) == len(event["plans"]) == 2

    first, expected = (list(read_jsonl(path / "rollouts.jsonl")) for path in (out, one))
    same = [line["step"] == 1 for line in first].count(True)
    assert same == 4
    for mine, whole in zip(first[:same], expected[:same], strict=True):
        assert mine["example"] == whole["example"]
        for name in ("text", "reward"):
            assert [leaf[name] for leaf in mine["leaves"]] == [
                leaf[name] for leaf in whole["leaves"]
            ]
    assert any(line["update/applied"] for line in metrics(out))
    for step, (mine, whole) in enumerate(zip(metrics(out), metrics(one), strict=True)):
        shares = [mine[f"ranks/{rank}/tokens"] for rank in range(2)]
        assert sum(shares) == mine["rollout/tokens"]
        assert min(shares) > 0
        assert mine["ranks/0/tokens_per_s"] > 0
        if step == 0:
            for name in ("reward", "rollout/tokens", "update/trained_tokens", "rollout/groups"):
                assert mine[name] == whole[name], name
            if whole["grad_norm"] is None:  # nothing to learn in this step
                assert mine["grad_norm"] is None
            else:
                assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_rank_is_killed_and_the_run_goes_on(tiny_folder, tmp_path):
    goes_on(tiny_folder, tmp_path, killed=1, again=2)


def goes_on(tiny_folder, tmp_path, *, killed, again):
    """A run of two of which one is killed ends soon, and so many ranks go on with it."""
    for _ in range(5):  # killed at some moments, MLX leaves the other in a collective
        told = one_is_killed(tiny_folder, tmp_path, killed)
        if "but hangs. It exits with what is on the disk" not in told or killed == 0:
            break
    if killed == 1:
        assert "localrl train --resume --out run" in told

    out = tmp_path / "run"
    step = Checkpoints(out / "checkpoints", pytest.fail).steps()[-1]
    assert killed == 0 or step >= 2
    resume = ["-m", "localrl", "train", "--resume", "--out", "run", "--steps", str(step + 2)]
    if again == 1:
        alone(tmp_path, resume)
    else:
        together.run(tmp_path, 2, resume)
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 3))


def one_is_killed(tiny_folder, tmp_path, killed):
    """A new run of two ranks, of which one is killed after two steps; what the other said."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    # Where rank 0 lives on, it has saved nothing before it stops.
    every = 10_000 if killed == 1 else 1
    changes = {"run.steps": 400, "run.eval_every": 0, "run.checkpoint_every": every}
    processes = together.start(tmp_path, 2, command(tiny_folder, "run", **changes))
    wait_for_steps(tmp_path / "run", 2, processes)
    processes[killed].send_signal(signal.SIGKILL)
    codes = together.ends(processes)
    assert codes[1 - killed] == 75
    told = together.said(tmp_path, 1 - killed)
    assert f"the death of rank {killed} (" in told
    return told


class Beside(Ranks):
    """Rank 0 beside one whose plan is another."""

    def __init__(self, other):
        super().__init__(0, 2)
        self.other = other

    def gather(self, data):
        return [data, to_bytes(vars(self.other), {})]


class Echo(Ranks):
    """Rank 1 of two, whose other rank says and does the same."""

    def __init__(self) -> None:
        super().__init__(1, 2, ("here", "there"))

    def gather(self, data):
        return [data, data]


def test_a_run_without_any_reward_ends_on_the_others_too(tiny_folder, tmp_path):
    (tmp_path / "none.py").write_text("def f(completions):\n    return [None] * len(completions)\n")
    changes = {"run.steps": 9, "rollout.prompts_per_step": 4}
    changes["task.rewards"] = [f"{tmp_path}/none.py:f"]
    config = RunConfig.create({**SETTINGS, **changes, "model.path": str(tiny_folder)})
    with pytest.raises(RewardError, match="of the last 3 steps got a reward: f gave None"):
        train(config, progress=False, ranks=Echo())


def test_the_smallest_machine_decides(tiny_folder):
    mine = plan()
    other = replace(mine, group_size=2, max_completion_tokens=7, decode_rows=1)
    used = []
    components = SimpleNamespace(
        config=RunConfig.create({"model.path": str(tiny_folder)}),
        plan=mine,
        use=used.append,
        sampler=SimpleNamespace(start_rule=lambda: used.append("rule")),
    )
    plans = _agree_on_plan(components, Beside(other))
    assert used == [replace(mine, group_size=2, max_completion_tokens=7), "rule"]
    assert plans == [vars(mine), vars(other)]
    assert from_bytes(to_bytes(plans, {}), {}) == plans


def test_more_ranks_than_prompts_are_refused(tiny_folder):
    config = RunConfig.create({"model.path": str(tiny_folder), "rollout.prompts_per_step": 1})
    with pytest.raises(ConfigError, match="Set it to 2 or a multiple"):
        _agree_on_plan(SimpleNamespace(config=config), Beside(plan()))
