"""SmolLM2-135M learns, its adapter is read elsewhere, and what a run takes is known before."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from localrl.backend import mx
from localrl.config import RunConfig
from localrl.engines.open import make_policy
from localrl.export.adapters import read_adapter
from localrl.memory.limit import beside_mlx, write_limit
from localrl.memory.machine import read_machine
from localrl.policy.model import load_model
from localrl.policy.precision import dequantise, to_float32
from localrl.runs.logs import read_jsonl
from localrl.train import train

VARIED = (
    "def varied(completion_ids):\n    return [sum(ids) % 997 / 996 for ids in completion_ids]\n"
)
STORIES = ("a ship", "a king", "a dog", "a city", "a river", "a storm", "a thief", "a garden")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prompts that call for long answers, and a reward that every group is divided by."""
    place = tmp_path_factory.mktemp("task")
    (place / "varied.py").write_text(VARIED)
    rows = [{"prompt": f"Tell me a long story about {what}."} for what in STORIES]
    (place / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config(folder, place, out, **changes):
    return RunConfig.create(
        {
            "model.path": str(folder),
            "task.name": str(place / "stories.jsonl"),
            "task.rewards": f"{place / 'varied.py'}:varied",
            "task.eval_prompts": 0,
            "rollout.prompts_per_step": 4,
            "rollout.group_size": 4,
            "rollout.max_completion_tokens": 24,
            "rollout.temperature": 0.7,
            "learning.lr": 1e-4,
            "learning.warmup_steps": 0,
            "run.out": str(out),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def trained(folder, place, tmp_path_factory):
    """Three steps, with constants measured on this machine before them."""
    gc.collect()  # models of other tests
    out = tmp_path_factory.mktemp("runs") / "three"
    return train(config(folder, place, out, **{"run.steps": 3, "memory.recalibrate": True}))


def test_three_steps_change_an_adapter_that_mlx_lm_reads(trained, folder):
    steps = list(read_jsonl(trained.folder / "metrics.jsonl"))
    assert [line["update/applied"] for line in steps] == [True, True, True]
    adapter = read_adapter(trained.folder / "adapter")
    ours = make_policy(
        load_model(folder), rank=adapter.rank, scale=adapter.scale, seed=0, for_cpu=True,
        dense=True, weights=adapter.weights, source=trained.folder,
    ).model  # fmt: skip
    bare = in_mlx_lm(folder)
    theirs = in_mlx_lm(folder, adapter_path=str(trained.folder / "adapter"))
    tokens = mx.array([[1, 504, 3575, 282, 4649, 314]])
    assert np.abs(np.array(theirs(tokens) - bare(tokens))).max() > 1e-3
    assert np.abs(np.array(theirs(tokens) - ours(tokens))).max() < 1e-4


def in_mlx_lm(folder, **options):
    """The model as mlx-lm reads it, in float32: its own 16-bit scales would round."""
    from mlx_lm.utils import load

    model = load(str(folder), **options)[0]
    dequantise(model, as_float32=True)
    to_float32(model)
    return model


def test_the_plan_says_what_the_run_takes(trained):
    """Every completion is as long as may be, and nearly every one is learned from."""
    steps = list(read_jsonl(trained.folder / "metrics.jsonl"))
    assert max(line["selection/trained"] for line in steps) == 16
    assert max(line["completions/mean_length"] for line in steps) == 24
    plan = trained.plan
    assert "MB counted for prompts of up to" in plan.reason
    assert plan.max_prompt_tokens < 64
    assert abs(plan.predicted_bytes - trained.peak_bytes) < 0.1 * trained.peak_bytes


def test_under_a_limit_it_stays_below(trained, folder, place, tmp_path):
    gc.collect()
    mx.clear_cache()
    beside = beside_mlx(read_machine(), mx.get_active_memory())
    limit = int(1.2 * trained.peak_bytes)  # a smaller one leaves the weights packed: slow
    setting = write_limit(limit + beside)
    changes = {"run.steps": 1, "memory.limit": setting, "memory.micro_rows": 16}
    result = train(config(folder, place, tmp_path / "run", **changes))
    assert result.peak_bytes <= result.plan.limit_bytes <= limit + 10**7
    assert result.plan.micro_rows < 16
    assert (result.plan.group_size, result.plan.max_completion_tokens) == (4, 24)
