"""The first steps of examples/smollm2."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from localrl.config import RunConfig
from localrl.runs.logs import read_jsonl
from localrl.train import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.mark.parametrize("file", ["train.toml", "sums.toml"])
def test_the_reward_rises(file, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLE)
    settings = {"model.path": str(folder), "task.eval_prompts": 0, "run.eval_every": 0}
    config = RunConfig.create(
        settings | {"run.steps": 12, "run.out": str(tmp_path / "run")}, file=file
    )
    train(config)
    rewards = [line["reward"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.1
