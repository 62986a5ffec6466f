"""The remembered speed of a model on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from localrl import RunConfig, train
from localrl.errors import Stopped
from localrl.memory.machine import Machine
from localrl.memory.sizes import read_sizes
from localrl.processes.heartbeat import Heartbeat
from localrl.training import speeds
from localrl.training.forecast import Forecast
from localrl.training.memory_plan import plan_request
from localrl.training.speeds import Speed, expected_s, key_of, recall

SIZES = read_sizes(tiny.CONFIG)
SPEED = Speed(
    step_token_s=0.01,
    evaluation_token_s=0.002,
    completion_tokens=50.0,
    max_completion_tokens=100,
)


def wanted(**changes):
    """Settings and the plan of 10 steps of 4 x 2 completions."""
    settings = {
        "model.path": "m",
        "run.steps": 10,
        "rollout.prompts_per_step": 4,
        "rollout.group_size": 2,
        "rollout.max_completion_tokens": 100,
        "task.eval_prompts": 32,
        **changes,
    }
    config = RunConfig.create(settings)
    return config, plan_request(config, SIZES, Machine("Linux", "cpu")).plan


def seconds(speed=SPEED, **changes):
    return expected_s(*wanted(**changes), SIZES, speed)


STEP_S, EVALUATION_S = 8 * 50 * 0.01, 32 * 50 * 0.002


def test_the_time_counts_steps_and_evaluations():
    assert seconds() == pytest.approx(10 * STEP_S + 2 * EVALUATION_S)
    assert seconds(**{"run.eval_every": 5}) == pytest.approx(10 * STEP_S + 3 * EVALUATION_S)
    assert seconds(**{"task.eval_prompts": 0}) == pytest.approx(10 * STEP_S)
    limited = seconds(**{"run.minutes": 0.1, "task.eval_prompts": 0})
    assert limited == pytest.approx(6)


def test_without_an_evaluation_its_tokens_take_as_long_as_those_of_a_step():
    found = seconds(replace(SPEED, evaluation_token_s=0.0))
    assert found == pytest.approx(10 * STEP_S + 2 * 32 * 50 * 0.01)


@pytest.mark.parametrize(
    ("mean", "limit", "expected"), [(50, 40, 40), (50, 400, 50), (95, 400, 380), (100, 10, 10)]
)
def test_completions_that_were_cut_say_nothing_of_longer_ones(mean, limit, expected):
    assert replace(SPEED, completion_tokens=mean).tokens(limit) == pytest.approx(expected)


def test_a_slow_evaluation_is_expected_on_as_many_prompts_as_it_will_use(monkeypatch):
    monkeypatch.setattr(speeds, "LARGE", 0)
    slow = replace(SPEED, evaluation_token_s=0.1)  # 5 s a prompt
    config, plan = wanted(**{"run.steps": 0})
    config = RunConfig.create({"model.path": "m", "run.steps": 0})
    assert expected_s(config, plan, SIZES, slow) == pytest.approx(64 * 5)


def session(steps=4, **changes):
    config, plan = wanted()
    forecast = Forecast.of(config, evaluates=True)
    forecast.evaluation_s = 6.4
    for n in range(steps):
        forecast.stepped(99.0 if n == 0 else 4.0, 400)
    evaluation = SimpleNamespace(passed=(True,) * 32, mean_completion_tokens=100.0)
    made = {
        "forecast": forecast,
        "ranks": SimpleNamespace(size=1),
        "demonstrations": None,
        "sampler": SimpleNamespace(shape=SimpleNamespace(leaves=2, rounds=1)),
        "config": config,
        "plan": plan,
        "evaluations": {0: evaluation},
        "request": SimpleNamespace(sizes=SIZES),
        "policy": SimpleNamespace(engine=SimpleNamespace(name="cpu")),
    }
    return SimpleNamespace(**{**made, **changes})


def test_what_is_remembered_leaves_out_the_first_step(tmp_path):
    file = tmp_path / "speeds.json"
    speeds.remember(session(), file)
    assert recall(SIZES, "cpu", file) == Speed(0.01, 0.002, 50.0, 100)
    assert recall(SIZES, "mlx", file) is None
    assert recall(replace(SIZES, width=65), "cpu", file) is None
    assert recall(replace(SIZES, stored_bytes=3), "cpu", file) is not None


@pytest.mark.parametrize("changes", [{"steps": 2}, {"ranks": SimpleNamespace(size=2)}])
def test_two_steps_and_several_machines_are_not_remembered(tmp_path, changes):
    speeds.remember(session(**changes), tmp_path / "speeds.json")
    assert not list(tmp_path.iterdir())


def test_without_evaluations_only_steps_are_remembered(tmp_path):
    file = tmp_path / "speeds.json"
    speeds.remember(session(evaluations={}), file)
    found = recall(SIZES, "cpu", file)
    assert found is not None
    assert (found.step_token_s, found.evaluation_token_s) == (0.01, 0.0)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"step_token_s": 1.0},
        {**vars(SPEED), "completion_tokens": "many"},
        {**vars(SPEED), "step_token_s": -1.0},
        {**vars(SPEED), "step_token_s": float("nan")},
        {**vars(SPEED), "max_completion_tokens": 0},
        {**vars(SPEED), "more": 1},
    ],
    ids=str,
)
def test_what_is_no_speed_is_not_taken(tmp_path, entry):
    file = tmp_path / "speeds.json"
    file.write_text(json.dumps({key_of(SIZES, "cpu"): entry}))
    assert recall(SIZES, "cpu", file) is None


SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 4,
    "task.eval_prompts": 2,
    "run.steps": 4,
}


class StopAfter(Heartbeat):
    """Asks the run to stop once it has trained this many steps."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def beat(self, *work):
        if self.file.is_file() and len(self.file.read_text().splitlines()) >= 5:
            self.stop("the test")
        super().beat(*work)


def test_runs_leave_their_speed_and_do_not_differ_by_it(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, heartbeat=None, **changes):
        settings = {"model.path": str(tiny_folder), "run.out": str(tmp_path / name), **SMALL}
        config = RunConfig.create(settings | changes)
        train(config, progress=False, heartbeat=heartbeat)
        return (tmp_path / name / "adapter" / "adapters.safetensors").read_bytes()

    file = tmp_path / "cache" / "localrl" / "speeds.json"
    first = run("first")
    [(key, entry)] = json.loads(file.read_text()).items()
    assert entry["completion_tokens"] <= 4
    assert entry["step_token_s"] > 0
    file.write_text(json.dumps({key: {**entry, "step_token_s": 1e9, "completion_tokens": 1.0}}))
    assert run("second") == first
    assert json.loads(file.read_text())[key]["step_token_s"] < 1e9
    file.unlink()
    stop = StopAfter(tmp_path / "stopped" / "metrics.jsonl")
    with pytest.raises(Stopped):
        run("stopped", stop, **{"run.steps": 400})
    assert key in json.loads(file.read_text())
