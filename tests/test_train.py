"""The whole loop on a tiny real model: what it writes, what it learns, what it refuses."""

from __future__ import annotations

import json
import socket
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrl import RunConfig, session, train
from localrl.errors import ConfigError, DataError
from localrl.runs.logs import read_jsonl
from localrl.runs.metrics import METRICS
from localrl.tasks.base import RewardSpec
from localrl.tasks.builtin import load_task

SETTINGS = {
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 12,
    "rollout.max_prompt_tokens": 40,
    "task.eval_prompts": 8,
    "learning.lr": 1e-3,
    "run.steps": 3,
}


def run(tiny_folder, out, **changes):
    settings = {**SETTINGS, "model.path": str(tiny_folder), "run.out": str(out), **changes}
    return train(RunConfig.create(settings))


@pytest.fixture(scope="module")
def result(tiny_folder, tmp_path_factory):
    return run(tiny_folder, tmp_path_factory.mktemp("runs") / "one", **{"run.eval_every": 2})


def test_the_run_folder_holds_everything(result):
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {
        "run.json", "config.toml", "plan.json", "metrics.jsonl", "rollouts.jsonl", "events.jsonl",
        "eval.json", "adapter",
    }  # fmt: skip
    marker = json.loads((result.folder / "run.json").read_text())
    assert {"localrl", "format", "mlx", "mlx_lm", "numpy", "blas"} <= set(marker)
    plan = json.loads((result.folder / "plan.json").read_text())
    assert plan["threads"] >= 1
    assert plan["predicted_bytes"] is None


def test_the_objective_is_written_down_for_what_it_is(result, tiny_folder, tmp_path):
    def objective(folder):
        return next(e for e in read_jsonl(folder / "events.jsonl") if e["kind"] == "objective")

    plain = objective(result.folder)
    assert (plain["name"], plain["prompt_weight"], plain["clip_high"]) == ("clipped", "none", 0.28)
    assert set(plain["effective_weight"].values()) == {1.0}
    settings = {"learning.objective": "grpo", "run.steps": 0, "rollout.group_size": 8}
    other = objective(run(tiny_folder, tmp_path / "grpo", **settings).folder)
    # Division by the std: hard and easy prompts count more than even ones.
    assert other["effective_weight"]["0.5"] == pytest.approx(1.7, abs=0.05)
    assert other["effective_weight"]["0.05"] == pytest.approx(2.3, abs=0.05)


def test_the_written_configuration_is_the_one_that_ran(result):
    written = RunConfig.create(file=result.folder / "config.toml")
    assert written.rollout.group_size == 4
    assert tomllib.loads((result.folder / "config.toml").read_text())["run"]["eval_every"] == 2


def test_every_metric_is_in_the_table_and_every_one_of_the_table_is_logged(result):
    logged = set().union(*read_jsonl(result.folder / "metrics.jsonl"))
    known = {name.replace("<name>", "final_answer") for name in METRICS}
    assert logged == known


def test_evaluations_come_before_after_and_between(result):
    lines = list(read_jsonl(result.folder / "metrics.jsonl"))
    assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 2, 3]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3]
    written = json.loads((result.folder / "eval.json").read_text())
    assert written["n"] == 8
    for side in ("base", "adapter"):
        assert set(written[side]) == {
            "n", "pass@1", "ci95", "mean_reward", "mean_completion_tokens"
        }  # fmt: skip


def test_rollouts_are_written_whole(result):
    lines = list(read_jsonl(result.folder / "rollouts.jsonl"))
    assert len(lines) == 3 * 4
    for line in lines:
        assert len(line["leaves"]) == 4
        for leaf in line["leaves"]:
            node = line["nodes"][leaf["node"]]
            assert len(node["token_ids"]) == len(node["sampled_logprobs"]) <= 12
            assert leaf["reward"] == 0.0  # a random model never gets a sum right


def teach_length(monkeypatch):
    """Reward short completions: something a random model can learn within a few steps."""
    spec = RewardSpec("short", f"{Path(__file__).parent / 'worker_functions.py'}:short")

    def load(name, *, train_prompts):
        return replace(load_task(name, train_prompts=train_prompts), rewards=(spec,))

    monkeypatch.setattr(session, "load_task", load)


def test_the_same_seed_gives_the_same_adapter(tiny_folder, tmp_path, monkeypatch):
    teach_length(monkeypatch)
    files = [
        run(tiny_folder, tmp_path / name, **{"run.seed": seed}).folder / "adapter"
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, same, other = ((path / "adapters.safetensors").read_bytes() for path in files)
    assert one == same
    assert one != other


def test_rewards_rise(tiny_folder, tmp_path, monkeypatch):
    teach_length(monkeypatch)
    result = run(
        tiny_folder,
        tmp_path / "run",
        **{"run.steps": 25, "learning.lr": 5e-3, "rollout.prompts_per_step": 8},
    )
    rewards = [line["reward"] for line in read_jsonl(result.folder / "metrics.jsonl")
               if "reward" in line]  # fmt: skip
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert result.adapter.mean_reward > result.base.mean_reward + 0.2


def test_decoding_in_small_batches_trains_the_same(tiny_folder, tmp_path, monkeypatch):
    from localrl.backend import mx

    teach_length(monkeypatch)
    folders = [
        run(
            tiny_folder,
            tmp_path / str(rows),
            **{"memory.decode_rows": rows, "memory.micro_rows": m},
        )
        for rows, m in ((16, 16), (3, 5))
    ]
    one, other = (mx.load(str(f.folder / "adapter" / "adapters.safetensors")) for f in folders)
    for name in one:
        np.testing.assert_allclose(np.array(one[name]), np.array(other[name]), atol=2e-4)


def test_no_network_is_touched(tiny_folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run(tiny_folder, tmp_path / "run", **{"run.steps": 1})


def test_no_steps_and_no_evaluation_are_fine(tiny_folder, tmp_path):
    result = run(tiny_folder, tmp_path / "run", **{"run.steps": 0, "task.eval_prompts": 0})
    assert (result.steps, result.base, result.adapter) == (0, None, None)
    assert not (result.folder / "eval.json").exists()


def test_minutes_end_the_training(tiny_folder, tmp_path):
    result = run(tiny_folder, tmp_path / "run", **{"run.steps": 10_000, "run.minutes": 0.02})
    assert 0 < result.steps < 10_000
    assert result.train_s >= 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.name": "step"}, "Unknown task 'step'"),
        ({"task.train_prompts": 2}, "prompts_per_step is 4, but the task has 2"),
        ({"model.path": "nowhere"}, "no model in nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_folder, tmp_path, changes, message
):
    with pytest.raises(ConfigError, match=message):
        run(tiny_folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_is_named(tiny_folder, tmp_path):
    with pytest.raises(DataError, match=r"Raise rollout\.max_prompt_tokens"):
        run(tiny_folder, tmp_path / "run", **{"rollout.max_prompt_tokens": 5})
