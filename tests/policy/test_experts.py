"""Adapters on stacked experts: their gradient, their files, what they add to a plan and a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from mixtures import MIXTURES, expert_paths

from localrl.backend import mx, nn, tree_flatten
from localrl.config import RunConfig
from localrl.display.console import Console
from localrl.engines.choose import choose_engine
from localrl.engines.mlx.network import in_training
from localrl.engines.open import make_policy
from localrl.export.adapters import adapter_of, peft_note, read_adapter, write_adapter
from localrl.export.fused import export_fused
from localrl.memory.sizes import lora_parameters, read_sizes
from localrl.policy.lora import adapters_off, experts_note
from localrl.policy.model import load_model
from localrl.policy.size import relative_size, weight_norms
from localrl.train import train

TOKENS = mx.array([[1, 5, 9, 2, 7] * 7, [3, 8, 8, 30, 11] * 7])
"""More than 64 choices of experts, which mlx-lm then sorts."""
FEW = TOKENS[:1, :9]


@pytest.fixture(scope="module", params=MIXTURES)
def made(request, tmp_path_factory):
    """A mixture's folder, a policy with adapters on experts and queries, and mlx-lm's model of it
    with the same adapter."""
    from mlx_lm.utils import load

    place = tmp_path_factory.mktemp(request.param)
    folder = tiny.make_folder(place / "model", **MIXTURES[request.param])
    policy = open_policy(folder, keys=("self_attn.q_proj", *expert_paths(request.param)))
    tiny.stir(policy.model, seed=0)
    write_adapter(adapter_of(policy.model), place / "adapter")
    return folder, policy, load(str(folder), adapter_path=str(place / "adapter"))[0]


def open_policy(folder, **options):
    options = {"rank": 4, "scale": 2.0, "seed": 0, "for_cpu": True, "dense": False, **options}
    return make_policy(load_model(folder), **options)


def gradient(model, tokens):
    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).sum()

    with in_training(model):
        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))


@pytest.mark.parametrize("tokens", [TOKENS, FEW], ids=["sorted", "few"])
def test_logits_and_gradients_are_those_of_mlx_lms_own_layers(made, tokens):
    _, policy, theirs = made
    theirs.freeze()
    for module in theirs.modules():
        if "lora_a" in module:
            module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    np.testing.assert_allclose(np.array(policy.model(tokens)), np.array(theirs(tokens)), atol=1e-5)
    found, expected = gradient(policy.model, tokens), gradient(theirs, tokens)
    assert found.keys() == expected.keys()
    assert any(array.ndim == 3 for array in found.values())
    for name, array in expected.items():
        largest = mx.abs(array).max().item()
        assert largest > 0
        assert mx.abs(found[name] - array).max().item() < 1e-5 * largest, name


def test_batches_and_forks_agree_with_single_rows(made):
    _, policy, _ = made
    told = []
    chosen = choose_engine(policy, warn=told.append)
    assert told == []
    assert {check.verdict for check in chosen.checks} == {"ok"}


def test_an_adapter_comes_back_and_has_no_peft_half(made):
    folder, policy, _ = made
    place = folder.parent / "adapter"
    read = read_adapter(place)
    assert "which transformers keeps in other matrices" in peft_note(place)
    again = open_policy(folder, keys=read.keys, weights=read.weights, source=place, seed=7)
    assert np.array_equal(np.array(again.model(TOKENS)), np.array(policy.model(TOKENS)))


def test_a_plan_counts_the_adapters_of_every_expert(made):
    folder, policy, _ = made
    sizes = read_sizes(json.loads((folder / "config.json").read_text()))
    count = sum(array.size for _, array in tree_flatten(policy.model.trainable_parameters()))
    assert lora_parameters(sizes, 4, 0, policy.lora_keys) == count


def test_the_fused_model_computes_the_same(made, tmp_path):
    folder, policy, _ = made
    fused = export_fused(adapter_of(policy.model), folder, tmp_path / "fused", dtype="float32")
    assert min(layer.cosine for layer in fused.layers) > 0.999
    assert any("switch" in layer.name for layer in fused.layers)
    ours = load_model(fused.folder).model
    np.testing.assert_allclose(
        np.array(ours(TOKENS)), np.array(policy.model(TOKENS)), atol=2e-5, rtol=1e-5
    )


def test_switched_off_they_change_nothing(made):
    folder, policy, _ = made
    with adapters_off(policy.model):
        logits = np.array(policy.model(FEW))
    np.testing.assert_allclose(logits, np.array(load_model(folder).model(FEW)), atol=1e-5)


def test_their_size_is_that_of_the_products(made):
    _, policy, _ = made
    norms = weight_norms(policy.model)
    layers = [m for m in policy.model.modules() if "lora_a" in m]
    expected = []
    for layer, norm in zip(layers, np.array(norms), strict=True):
        a, b = (np.array(factor, np.float64) for factor in layer.factors)
        expected.append(np.linalg.norm(layer.scale * (b @ a)) / norm)
    assert relative_size(policy.model, norms) == pytest.approx(np.mean(expected), rel=1e-4)


def test_what_is_not_adapted_is_told(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", **MIXTURES["qwen3_moe"])
    # By hand, of each block: queries and output 64 x 64, keys and values 64 x 32; a router 64 x 4;
    # 4 experts of three matrices 64 x 32. And an embedding of 64 x 64.
    attention, experts = 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 4 * 3 * 64 * 32
    total = attention + experts + 2 * 64 * 4 + 64 * 64
    note = experts_note(open_policy(folder).model)
    assert note.startswith(f"on layers of {attention / 1e6:.2f} of {total / 1e6:.2f} million")
    assert "mlp.switch_mlp.up_proj" in note
    keys = expert_paths("qwen3_moe")
    left = experts_note(open_policy(folder, keys=keys[:2]).model)
    assert left.endswith("names them: mlp.switch_mlp.down_proj")
    assert experts_note(open_policy(folder, keys=keys).model) is None
    assert experts_note(open_policy(tiny.make_folder(tmp_path / "dense")).model) is None


SETTINGS = {
    "task.rewards": f"{Path(__file__).parents[1] / 'worker_functions.py'}:high",
    "task.eval_prompts": 0,
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 6,
    "learning.lr": 1e-2,
    "learning.warmup_steps": 0,
    "lora.rank": 4,
}


def test_a_run_trains_them_resumes_and_is_started_from(tmp_path, capsys):
    folder = tiny.make_folder(tmp_path / "model", **MIXTURES["qwen3_moe"])
    out, next_out = tmp_path / "run", tmp_path / "next"
    places = {"model.path": str(folder), "run.out": str(out)}
    keys = list(expert_paths("qwen3_moe"))
    nothing = {**SETTINGS, **places, "run.steps": 0, "run.out": str(tmp_path / "attention")}
    train(RunConfig.create(nothing), progress=Console())
    told = "adapters on layers of 0.02 of 0.08 million weights; experts have none unless lora.keys"
    assert told in capsys.readouterr().err
    settings = {**SETTINGS, **places, "lora.keys": keys, "run.steps": 1}
    first = read_adapter(train(RunConfig.create(settings)).folder / "adapter")
    assert set(first.keys) == set(keys)
    assert all(mx.any(array != 0).item() for array in first.weights.values())
    train(RunConfig.create({**settings, "run.steps": 2}), resume=True)
    second = read_adapter(out / "adapter")
    start = {"run.steps": 0, "run.out": str(next_out), "lora.adapter": str(out / "adapter")}
    train(RunConfig.create({**SETTINGS, **places, **start}))
    third = read_adapter(next_out / "adapter")
    for name, array in second.weights.items():
        assert not mx.array_equal(first.weights[name], array).item()
        assert mx.array_equal(third.weights[name], array).item()
