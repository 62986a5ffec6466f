"""Warnings about settings that do not suit the model."""

from __future__ import annotations

import pytest

from localrl import RunConfig, train
from localrl.policy.model import Policy
from localrl.training.session import NullProgress


class Listener(NullProgress):
    def __init__(self):
        self.lines = []

    def warn(self, line):
        self.lines.append(line)


@pytest.mark.parametrize(
    ("sixteen_bit", "learning", "warned"),
    [
        (True, {"updates_per_step": 2}, True),
        (False, {"updates_per_step": 2}, False),
        (True, {}, False),
        (True, {"updates_per_step": 2, "clip_low": 0.2, "clip_high": 0.2}, False),
        (True, {"updates_per_step": 2, "objective": "grpo"}, False),
    ],
)
def test_a_range_below_rounding_is_told(
    tiny_folder, tmp_path, monkeypatch, sixteen_bit, learning, warned
):
    monkeypatch.setattr(Policy, "sixteen_bit", property(lambda self: sixteen_bit))
    settings = {
        "model.path": str(tiny_folder),
        "run.out": str(tmp_path / "run"),
        "run.steps": 1,
        "task.eval_prompts": 0,
        "rollout.prompts_per_step": 1,
        "rollout.group_size": 2,
        "rollout.max_completion_tokens": 4,
    }
    given = {
        f"learning.{name}": value for name, value in ({"objective": "gspo"} | learning).items()
    }
    listener = Listener()
    train(RunConfig.create(settings | given), progress=listener)
    told = [line for line in listener.lines if "learning.updates_per_step (now 2)" in line]
    assert len(told) == warned
