"""Warnings about settings that do not suit the model."""

from __future__ import annotations

import pytest

from localrl import RunConfig, train
from localrl.policy.model import Policy
from localrl.runs.logs import read_jsonl
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


def test_reward_functions_see_the_rendered_prompt(tiny_folder, tmp_path):
    file = tmp_path / "seen.py"
    file.write_text(
        "def seen(completions, prompts, rendered_prompts, log_metric):\n"
        "    pairs = zip(prompts, rendered_prompts, strict=True)\n"
        "    whole = [p[-1]['content'] in r and p[-1]['content'] != r for p, r in pairs]\n"
        "    log_metric('whole', sum(whole) / len(whole))\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    settings = {
        "model.path": str(tiny_folder),
        "run.out": str(tmp_path / "run"),
        "run.steps": 1,
        "task.rewards": (f"{file}:seen",),
        "task.eval_prompts": 0,
        "rollout.prompts_per_step": 1,
        "rollout.group_size": 2,
        "rollout.max_completion_tokens": 4,
    }
    train(RunConfig.create(settings), progress=Listener())
    [step] = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert step["whole"] == 1.0
