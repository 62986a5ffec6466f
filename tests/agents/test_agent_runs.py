"""Whole runs whose completions are those of an agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrl.config import RunConfig
from localrl.diagnostics.compare import evaluate_model
from localrl.errors import ConfigError, Stopped
from localrl.processes.heartbeat import Heartbeat
from localrl.runs.logs import read_jsonl
from localrl.train import train

PROGRAMS = Path(__file__).with_name("programs.py")
UNTIMED = ("time/", "memory/", "step_time")


def config(out, **changes):
    return RunConfig.create(
        {
            "model.path": "turns-0.1m",
            "task.name": "guessing",
            "task.agent": f"{PROGRAMS}:guess",
            "task.agent_timeout_s": 300.0,
            "task.eval_prompts": 3,
            "rollout.prompts_per_step": 3,
            "rollout.group_size": 3,
            "rollout.max_turns": 4,
            "rollout.max_completion_tokens": 60,
            "learning.lr": 0.01,
            "run.steps": 3,
            "run.checkpoint_every": 1,
            "run.out": str(out),
            **changes,
        }
    )


class StopWhileSampling(Heartbeat):
    """A heartbeat that stops the run at one of the tokens that it samples."""

    def __init__(self, token):
        super().__init__()
        self.left = token

    def beat(self, work=None):
        samples = work is not None and work.name == "sampling"
        self.left -= samples
        if samples and self.left == 0:
            self.stop("the test says so")
        super().beat(work)


def outcome(out):
    """All that a run leaves behind, but for times and memory."""
    metrics = [
        {name: value for name, value in line.items() if not name.startswith(UNTIMED)}
        for line in read_jsonl(out / "metrics.jsonl")
    ]
    files = ("adapter/adapters.safetensors", "rollouts.jsonl", "eval.json")
    return metrics, [(out / name).read_bytes() for name in files]


@pytest.mark.exact
def test_a_run_with_an_agent_trains_and_goes_on_exactly_after_a_stop(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    counter = StopWhileSampling(0)
    train(config(whole), heartbeat=counter)
    with pytest.raises(Stopped):
        train(config(stopped), heartbeat=StopWhileSampling(int(-counter.left * 0.6)))
    train(config(stopped), resume=True)
    assert outcome(stopped) == outcome(whole)
    steps = [line for line in read_jsonl(whole / "metrics.jsonl") if "reward" in line]
    assert all(line["rollout/sequences"] == 1 and line["rollout/failed"] == 0 for line in steps)
    assert all(line["rewards/guess/mean"] is not None for line in steps)
    assert any(line["update/applied"] for line in steps)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rollout.strategy": "tree", "rollout.group_size": 4}, "cannot be copied"),
        ({"rollout.reuse": 0.5}, "cannot be restarted from its middle"),
        ({"task.environment": "localrl.tasks.guessing:Guess"}, "an agent brings its own"),
    ],
)
def test_settings_that_do_not_go_with_agents(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        train(config(tmp_path / "run", **settings))


@pytest.mark.parametrize("key", ["task.environment", "task.tools"])
def test_an_evaluation_refuses_them_too(tmp_path, key):
    both = config(tmp_path, **{key: "localrl.tasks.guessing:Guess"})
    with pytest.raises(ConfigError, match="an agent brings its own"):
        evaluate_model(both, seed=0, warn=print, tell=print)
