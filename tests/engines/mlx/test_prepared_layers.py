"""Prepared adapters compute what the layers compute, are renewed with them, and exist once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from localrl.backend import mx, nn, tree_flatten
from localrl.engines.mlx.adapters import find_siblings, prepare
from localrl.engines.mlx.decode import prefill
from localrl.engines.mlx.engine import open_engine
from localrl.engines.open import make_policy
from localrl.policy.lora import LoRALinear, adapters_off
from localrl.policy.model import load_model

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def make(tmp_path):
    def made(*, dense=False, keys=(), **changes):
        loaded = load_model(tiny.make_folder(tmp_path / "model", **changes))
        policy = make_policy(
            loaded, rank=4, scale=2.0, seed=0, for_cpu=dense, dense=dense, keys=keys
        )
        tiny.stir(policy.model, 0)
        return policy.model

    return made


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def names(model):
    paths = {id(module): path for path, module in model.named_modules()}
    return [sorted(paths[id(layer)] for layer in group.layers) for group in find_siblings(model)]


def test_layers_with_one_input_are_found(make):
    block = "model.layers.0"
    assert names(make())[:4] == [
        [f"{block}.self_attn.{name}_proj" for name in ("k", "q", "v")],
        [f"{block}.self_attn.o_proj"],
        [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"],
        [f"{block}.mlp.down_proj"],
    ]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "lfm2"])
def test_prepared_layers_compute_the_same(make, dense, family):
    model = make(dense=dense, **tiny.FAMILIES[family])
    plain = logits(model)
    prepare(find_siblings(model))
    assert all(layer.prepared for layer in layers(model))
    np.testing.assert_allclose(logits(model), plain, atol=1e-5)
    # The model's own weights are what they were, in the same order.
    for layer in layers(model):
        layer.prepared = None
    np.testing.assert_array_equal(logits(model), plain)


def test_some_adapters_alone(make):
    model = make(dense=True, keys=["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
    plain = logits(model)
    prepare(find_siblings(model))
    np.testing.assert_allclose(logits(model), plain, atol=1e-5)


def test_layers_of_different_formats_are_computed_apart(make):
    model = make()
    attention = model.model.layers[0].self_attn
    half = nn.QuantizedLinear(64, 32, bias=False, group_size=32, bits=8)
    attention.v_proj["linear"] = half
    assert [len(group.layers) for group in find_siblings(model)][:3] == [2, 1, 1]
    plain = logits(model)
    prepare(find_siblings(model))
    np.testing.assert_allclose(logits(model), plain, atol=1e-5)


def test_an_update_and_a_switch_are_seen(make):
    model = make(dense=True)
    siblings = find_siblings(model)
    prepare(siblings)
    tiny.stir(model, 1)
    changed = logits(model)
    assert not any(layer.prepared.fits(layer, TOKENS) for layer in layers(model))
    prepare(siblings)
    np.testing.assert_allclose(logits(model), changed, atol=1e-5)
    with adapters_off(model):
        off = logits(model)
    assert abs(off - changed).max() > 1e-3
    kept = [layer.prepared for layer in layers(model)]
    prepare(siblings)
    assert [layer.prepared for layer in layers(model)] == kept


def test_frozen_weights_are_joined_once(make):
    model = make()
    siblings = find_siblings(model)
    prepare(siblings)
    frozen = [layer.linear.weight for layer in layers(model)]
    tiny.stir(model, 1)
    prepare(siblings)
    assert all(layer.linear.weight is w for layer, w in zip(layers(model), frozen, strict=True))


def test_gradients_pass_by_them(make):
    model = make(dense=True)

    def gradient():
        loss = nn.value_and_grad(model, lambda: mx.square(model(TOKENS)).mean())
        return dict(tree_flatten(loss()[1]))

    plain = gradient()
    prepare(find_siblings(model))
    for name, array in gradient().items():
        assert mx.array_equal(array, plain[name]), name


def test_weights_exist_once_and_keep_their_order(make):
    model = make()
    before = [(name, array.shape) for name, array in tree_flatten(model.parameters())]
    mx.eval(model.parameters())
    held = mx.get_active_memory()
    prepare(find_siblings(model))
    adapters = sum(a.nbytes for _, a in tree_flatten(model.trainable_parameters()))
    # The copies of the adapters, whose blocks stand in a matrix three times as wide; no weights.
    assert mx.get_active_memory() - held < 3 * adapters
    assert [(name, array.shape) for name, array in tree_flatten(model.parameters())] == before


def test_no_activation_outlives_a_prefill(make):
    engine = open_engine(make(dense=True))
    prompts = np.tile(np.arange(5, 37), (4, 8))
    prepare(engine.siblings)
    plain = replace(engine, siblings=())
    held = []
    for each in (plain, engine):
        prefilled = prefill(each.network, prompts, [prompts.shape[1]] * 4)
        held.append(mx.get_active_memory())
        del prefilled
    assert held[1] <= held[0] + 4096
