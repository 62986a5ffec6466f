"""Objectives and the KL through the whole loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrl import RunConfig, train
from localrl.learning.objectives import OBJECTIVES
from localrl.runs.logs import read_jsonl

FUNCTIONS = Path(__file__).parent.parent / "worker_functions.py"


@pytest.fixture
def run(tiny_folder, tmp_path):
    """A run of two steps with two updates each, rewarding short completions."""

    def start(name, **learning):
        settings = {
            "model.path": str(tiny_folder),
            "run.out": str(tmp_path / name),
            "run.steps": 2,
            "task.eval_prompts": 0,
            "task.rewards": f"{FUNCTIONS}:short",
            "rollout.prompts_per_step": 4,
            "rollout.group_size": 4,
            "rollout.max_completion_tokens": 12,
            "learning.lr": 1e-2,
            "learning.updates_per_step": 2,
            "learning.warmup_steps": 0,
        }
        settings.update({f"learning.{key}": value for key, value in learning.items()})
        return train(RunConfig.create(settings)).folder

    return start


def test_every_name_trains_another_adapter(run):
    adapters = {
        (run(name, objective=name) / "adapter" / "adapters.safetensors").read_bytes()
        for name in OBJECTIVES
    }
    assert len(adapters) == len(OBJECTIVES)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_is_logged(run, estimator):
    folder = run(estimator, kl_coef=0.1, kl_estimator=estimator)
    first, second = (line["kl"] for line in read_jsonl(folder / "metrics.jsonl"))
    # A step's numbers are those of its first update: the first one finds fresh adapters.
    assert first == pytest.approx(0, abs=1e-6)
    assert abs(second) > 1e-6


def test_without_a_coefficient_the_kl_is_null(run):
    folder = run("none")
    assert [line["kl"] for line in read_jsonl(folder / "metrics.jsonl")] == [None, None]


def test_completions_cut_off_for_length_are_masked(run):
    folder = run("masked", mask_truncated=True)
    leaves = [leaf for g in read_jsonl(folder / "rollouts.jsonl") for leaf in g["leaves"]]
    cut = [leaf for leaf in leaves if leaf["finish_reason"] == "length"]
    assert 0 < len(cut) < len(leaves)
    assert {leaf["dropped"] for leaf in cut} == {"truncated"}
    counts = [line["selection/truncated"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert sum(counts) == len(cut)
    assert "truncated" not in {leaf.get("dropped") for leaf in leaves if leaf not in cut}


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [1, 1 / 2]), ("cosine", [1, 1 / 2])])
def test_the_learning_rate_of_a_run_falls(run, schedule, rates):
    folder = run(schedule, lr_schedule=schedule, lr=1e-3)
    # Two updates a step, and each line has the rate of the first.
    found = [line["learning_rate"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert found == pytest.approx([1e-3 * rate for rate in rates])
