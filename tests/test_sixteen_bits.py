"""Whole runs of MLX in 16 bits, rounded as on Metal: no untrue warning, and every check told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from emulation import LIMITS, metal
from forests import flat_group, forest, scored
from steps import selection

from localrl.backend import mx
from localrl.config import RunConfig
from localrl.embedded import embedded_model_path
from localrl.engines.choose import choose_engine
from localrl.engines.mlx.forest import LevelCache
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.learning.objectives import OBJECTIVES
from localrl.policy import scoring
from localrl.policy.model import load_model
from localrl.policy.precision import cast_floats
from localrl.policy.scoring import forest_agrees, group_logprobs
from localrl.records import Example
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups
from localrl.runs.logs import read_jsonl
from localrl.train import train
from localrl.training import components
from localrl.training.session import NullProgress

VARIED = f"{Path(__file__).parent / 'worker_functions.py'}:short"
CHECKS = ["body_and_head", "padded_prompts", "forked_rows", "shared_prompts", "layers_together",
          "recomputed_gradient", "forest_mean", "forest_p99"]  # fmt: skip
ALL = [(dtype, limit) for dtype in ("bf16", "fp16") for limit in LIMITS]


class Listener(NullProgress):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, line: str) -> None:
        self.told.append(line)


def config(folder, out, dtype):
    return RunConfig.create(
        {
            "model.path": str(folder),
            "model.engine": "mlx",
            "model.dtype": dtype,
            "memory.dequantise": "off",
            "task.rewards": VARIED,
            "task.eval_prompts": 8,
            "rollout.prompts_per_step": 4,
            "rollout.group_size": 4,
            "rollout.max_completion_tokens": 10,
            "rollout.max_prompt_tokens": 40,
            "learning.lr": 1e-3,
            "run.steps": 2,
            "run.out": str(out),
        }
    )


@pytest.mark.parametrize(("dtype", "limit"), ALL)
def test_a_run_begins_trains_and_evaluates(tiny_folder, tmp_path, dtype, limit):
    listener = Listener()
    with metal(limit=limit):
        result = train(config(tiny_folder, tmp_path / "run", dtype), progress=listener)
    assert listener.told == []
    steps = [s for s in read_jsonl(result.folder / "metrics.jsonl") if "update/applied" in s]
    assert [step["update/applied"] for step in steps] == [True, True]
    events = list(read_jsonl(result.folder / "events.jsonl"))
    assert [e["dtype"] for e in events if e["kind"] == "dtype"] == [dtype]
    checks = [c for e in events if e["kind"] == "selfcheck" for c in e["checks"]]
    assert [c["name"] for c in checks] == ["float16_range"] * (dtype == "fp16") + CHECKS
    assert {c["verdict"] for c in checks} == {"ok"}
    assert max(c["value"] for c in checks if c["name"] != "float16_range") < 1e-4
    evaluated = json.loads((result.folder / "eval.json").read_text())
    assert evaluated["n"] == 8


def in_16_bits(folder, kind):
    """A policy on 4-bit weights whose adapters do something."""
    loaded = load_model(folder)
    cast_floats(loaded.model, kind)
    policy = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=False, dense=False)
    tiny.stir(policy.model, 0)
    return choose_engine(policy, "mlx")


def gap(policy):
    """Mean |log-probability of the update - that of the sampler| in nats."""
    prompts = [
        Example(text, ({"role": "user", "content": text},)) for text in ("1+2", "a sum of 7")
    ]
    groups = sample_groups(
        Decoder(policy, 1.0, 16),
        prompts,
        [policy.tokenizer.encode(p.messages) for p in prompts],
        Shape(8, 8),
        rule=None,
        max_completion_tokens=16,
        seed=0,
        step=1,
        version=0,
    )
    found = group_logprobs(
        policy, groups, shared=True, micro_rows=8, head_chunk=64, temperature=1.0
    )
    new = np.concatenate([values for of_group in found for values in of_group])
    old = np.concatenate([node.sampled_logprobs for group in groups for node in group.nodes])
    return np.abs(new - old).mean()


def test_sampler_and_update_agree_better_in_float16(tiny_folder):
    with metal(limit=14):
        coarse, fine = (gap(in_16_bits(tiny_folder, k)) for k in (mx.bfloat16, mx.float16))
    assert 1e-4 < fine < coarse / 4
    assert coarse < 0.05


def batch():
    groups = [scored(forest([-1, -1, 0, 0], [1, 2, 3], 2, tokens=5), [0, 1, 0]),
              scored(flat_group(4), [1, 0, 0, 1])]  # fmt: skip
    return selection(OBJECTIVES["clipped"], groups).batch


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_positions_off_by_one_are_found_under_any_rounding(tiny_folder, monkeypatch, kind):
    with metal(limit=6):
        policy = in_16_bits(tiny_folder, kind)
        policy.checks.clear()
        assert forest_agrees(policy, batch(), temperature=1.0, head_chunk=16)
        assert [check.verdict for check in policy.checks] == ["ok", "ok"]
        usual = LevelCache.__init__

        def shifted(self, level, above, last):
            usual(self, level, above, last)
            self.offset = self.offset + (above is not None)

        monkeypatch.setattr(LevelCache, "__init__", shifted)
        assert not forest_agrees(policy, batch(), temperature=1.0, head_chunk=16)


def test_the_embedded_model_shares_prefixes_under_tf32():
    loaded = load_model(embedded_model_path())
    with metal(tf32=True):
        policy = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=True, dense=False)
        tiny.stir(policy.model, 0, 0.02)
        policy = choose_engine(policy, "mlx")
        assert policy.engine.shares_prompts
        assert forest_agrees(policy, batch(), temperature=1.0, head_chunk=16)
    values = {check.name: check.value for check in policy.checks}
    assert {check.verdict for check in policy.checks} == {"ok"}
    # Two passes may round alike, but not all of them.
    assert 1e-5 < max(values["padded_prompts"], values["forked_rows"]) < 5e-3
    assert 1e-4 < values["forest_mean"] < 1e-2


def test_a_small_error_is_told_and_a_large_one_refused(tiny_folder, monkeypatch):
    """Wrong positions of padded rows; by how much, depends on the factor."""
    policy = in_16_bits(tiny_folder, mx.bfloat16)
    usual = type(policy.engine.network).last_logits
    for factor, verdict in ((1.02, "warn"), (1.2, "refuse")):

        def wrong(self, *args, factor=factor):
            return usual(self, *args) * factor

        monkeypatch.setattr(type(policy.engine.network), "last_logits", wrong)
        told: list[str] = []
        if verdict == "refuse":
            with pytest.raises(ConfigError, match=r"Use another model.*model\.selfcheck=warn"):
                choose_engine(policy, "mlx", told.append)
        found = choose_engine(policy, "mlx", told.append, selfcheck="warn")
        checks = {check.name: check.verdict for check in found.checks}
        assert checks["padded_prompts"] == checks["forked_rows"] == verdict
        assert "padded prompts" in told[0]


def test_a_forest_in_the_band_is_used_and_told(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "MEAN_LIMITS", (-1.0, 0.06))
    listener = Listener()
    with metal():
        result = train(config(tiny_folder, tmp_path / "run", "bf16"), progress=listener)
    [line] = listener.told
    assert line.startswith("the self-check forest_mean found ")
    steps = [s for s in read_jsonl(result.folder / "metrics.jsonl") if "update/applied" in s]
    assert steps[0]["update/saved_positions"] > 0


def test_a_gradient_that_is_no_number_is_told(tiny_folder):
    policy = in_16_bits(tiny_folder, mx.bfloat16)
    norm = policy.model.layers[1].input_layernorm
    norm.weight = norm.weight * mx.nan
    told: list[str] = []
    assert not components._may_recompute(policy, told.append)
    assert "not a number" in told[0]
    assert policy.checks[-1].verdict == "refuse"
