"""Parts of a model in NumPy against MLX's and finite differences; models that are left to MLX."""

from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny
from arrays import NAMES, array_policy
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.smollm3 import NoPE

from localrl.backend import mx, nn, tree_flatten
from localrl.engines.choose import choose_engine
from localrl.engines.cpu import model as cpu_model
from localrl.engines.cpu.decode import _rows_of as rows_of
from localrl.engines.cpu.math import Norm, sigmoid, swiglu, swiglu_back
from localrl.engines.cpu.model import CPUModel, Rope, UnfitError
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.policy.lora import LoRALinear, adapters_off
from localrl.policy.model import load_model


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def single(*arrays):
    return [array.astype(np.float32) for array in arrays]


def slope_of(function, x, step=1e-6):
    """Gradient (x.shape) of a function of a float64 array to a number, by central differences."""
    found = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            ends.append(function(moved))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3)])
def test_the_gradient_through_a_norm(shape):
    x, grad, weight = drawn(0, *shape), drawn(1, *shape), drawn(2, shape[-2], 1)

    def plain(moved):
        return weight * moved / np.sqrt((moved**2).mean(axis=-2, keepdims=True) + 1e-2)

    norm = Norm(weight.astype(np.float32), 1e-2)
    x32, slope32 = single(x, grad)
    np.testing.assert_allclose(norm(x32), plain(x), atol=1e-5)
    expected = slope_of(lambda moved: (plain(moved) * grad).sum(), x)
    np.testing.assert_allclose(norm.back(x32, slope32), expected, atol=1e-5)
    np.testing.assert_array_equal(x32, x.astype(np.float32))


def test_a_norm_is_mlxs():
    layer = nn.RMSNorm(8, eps=1e-2)
    layer.weight = mx.array(drawn(0, 8).astype(np.float32))
    (x,) = single(drawn(1, 8, 5))
    found = cpu_model._norm(layer)(x)
    np.testing.assert_allclose(found, np.array(layer(mx.array(x.T))).T, atol=1e-6)


def layers(adapted, bias):
    """Layers of 5 inputs, of them some with an adapter of its own rank and scale."""
    mx.random.seed(0)
    made = []
    for n, outputs in enumerate((7, 3, 4)):
        layer = nn.Linear(5, outputs, bias=bias)
        if n in adapted:
            layer = LoRALinear(layer, 2 + n, 0.5 + n, mx.random.key(n))
            layer.lora_b = mx.random.normal(layer.lora_b.shape)
        made.append(layer)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [(), (0,), (1, 2), (0, 2), (0, 1, 2)])
def test_linear_layers_and_their_gradients_are_mlxs(adapted, bias):
    made = layers(adapted, bias)
    x, *grads = single(drawn(0, 5, 6), *(drawn(1 + n, m, 6) for n, m in enumerate((7, 3, 4))))
    ours = cpu_model._linears(*made)
    for found, layer in zip(ours(x), made, strict=True):
        np.testing.assert_allclose(found, np.array(layer(mx.array(x.T))).T, atol=1e-5)

    def loss(states, pairs):
        rest, total = iter(pairs), mx.array(0.0)
        for n, (layer, grad) in enumerate(zip(made, grads, strict=True)):
            if n in adapted:
                layer.lora_a, layer.lora_b = next(rest)
            total = total + (layer(states) * mx.array(grad.T)).sum()
        return total

    pairs = [(made[n].lora_a, made[n].lora_b) for n in adapted]
    expected, by_pairs = mx.grad(loss, argnums=(0, 1))(mx.array(x.T), pairs)
    found, ours_by_pairs = ours.back(x, grads)
    np.testing.assert_allclose(found, np.array(expected).T, atol=1e-4)
    assert len(ours_by_pairs) == len(adapted)
    for mine, theirs in zip(ours_by_pairs, by_pairs, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, np.array(b), atol=1e-4)
    nothing, again = ours.back(x, grads, need_grad_x=False)
    assert nothing is None
    for mine, other in zip(again, ours_by_pairs, strict=True):
        np.testing.assert_array_equal(mine[0], other[0])
        np.testing.assert_array_equal(mine[1], other[1])


def test_the_gradients_through_the_gate():
    gate, x, grad = (drawn(n, 4, 5) * 3 for n in range(3))

    def plain(gate, x):
        return gate / (1 + np.exp(-gate)) * x

    gate32, x32, slope32 = single(gate, x, grad)
    np.testing.assert_allclose(swiglu(gate32, x32), plain(gate, x), atol=2e-5)
    found = swiglu_back(gate32, x32, slope32)
    by_gate = slope_of(lambda moved: (plain(moved, x) * grad).sum(), gate)
    np.testing.assert_allclose(found[0], by_gate, atol=5e-5)
    np.testing.assert_allclose(found[1], plain(gate, grad), atol=5e-5)


def test_the_gate_far_from_0():
    gate = np.array([-100, -89, -10, 0, 10, 100], np.float32)
    before, ones = gate.copy(), np.ones_like(gate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(swiglu(gate, ones), [0, 0, -10 / (1 + np.e**10), 0, 9.9995, 100],
                                   atol=1e-4)  # fmt: skip
        np.testing.assert_allclose(sigmoid(gate)[[0, 3, 5]], [0, 0.5, 1], atol=1e-7)
        by_gate, grad_x = swiglu_back(gate, ones, ones)
    np.testing.assert_allclose(by_gate[[0, 3, 5]], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(grad_x[[0, 3, 5]], [0, 0, 100], atol=1e-4)
    np.testing.assert_array_equal(gate, before)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 1.5, 2.0, 3.0],
}


def rope(settings=None, dims=8, traditional=False):
    return initialize_rope(dims, 100.0, traditional, settings, 512)


ROPES = {
    "halves": rope(),
    "neighbours": rope(traditional=True),
    "partial": rope(dims=4),
    "partial neighbours": rope(dims=4, traditional=True),
    "linear": rope({"rope_type": "linear", "factor": 4.0}),
    "llama3": rope(LLAMA3),
    "yarn": rope(YARN),
    "long": rope(LONG),
    "none": NoPE(),
}


@pytest.mark.parametrize("kind", list(ROPES))
def test_positions_turn_as_the_layer_turns_them(kind):
    layer, positions = ROPES[kind], np.array([0, 1, 3, 40, 333, 5])
    rope = Rope(layer, 8)
    tables = rope.tables(positions)
    (x,) = single(drawn(0, 2, 8, 6))
    turned = rope.rotate(x, tables)
    for n, position in enumerate(positions):
        one = mx.array(np.ascontiguousarray(x[:, :, n])[None, :, None])
        expected = np.array(layer(one, offset=int(position)))[0, :, 0]
        np.testing.assert_allclose(turned[:, :, n], expected, atol=1e-4)
    # One head for each unit vector: what comes of them is the matrix of every position.
    units = np.ascontiguousarray(np.broadcast_to(np.eye(8, dtype=np.float32)[..., None], (8, 8, 6)))
    forth, back = rope.rotate(units, tables), rope.back(units, tables)
    np.testing.assert_allclose(back, forth.swapaxes(0, 1), atol=1e-7)


def test_layers_that_turn_alike_have_one_table():
    assert Rope(rope(), 8).same_rotation(Rope(rope(), 8))
    kinds = [Rope(layer, 8) for layer in ROPES.values()]
    for i, one in enumerate(kinds):
        assert [one.same_rotation(other) for other in kinds] == [i == n for n in range(len(kinds))]


def test_rows_as_a_slice():
    assert rows_of(np.array([3, 4, 5])) == slice(3, 6)
    assert rows_of(np.array([2])) == slice(2, 3)
    for index in ([3, 5], [4, 3], []):
        np.testing.assert_array_equal(rows_of(np.array(index, int)), index)


def made(folder, *, dense=True, **changes):
    loaded = load_model(tiny.make_folder(folder, **changes))
    return make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=True, dense=dense)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (tiny.FAMILIES["gemma3_text"], "unsupported family"),
        (tiny.FAMILIES["qwen3_moe"], "unsupported family"),
        ({"dense": False}, "uint32"),
    ],
    ids=["windows", "experts", "quantised"],
)
def test_models_that_are_left_to_mlx(tmp_path, changes, reason):
    policy = made(tmp_path / "model", **changes)
    with pytest.raises(UnfitError, match=reason):
        CPUModel(policy.model)
    assert choose_engine(policy).engine.name == "mlx"


def test_weights_are_joined_a_block_at_a_time(tmp_path, monkeypatch):
    """NumPy's copies are not in MLX's memory, so no plan counts those of a whole model."""
    wide = {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 512}
    policy = made(tmp_path / "model", bits=None, **wide)
    monkeypatch.setattr(cpu_model, "choose", lambda sizes: None)  # times kernels on arrays
    block = sum(array.nbytes for _, array in tree_flatten(policy.model.layers[0].parameters()))
    tracemalloc.start()
    CPUModel(policy.model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * block


def test_positions_that_depend_on_the_length(tmp_path):
    policy = made(tmp_path / "model", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnfitError, match="DynamicNTKScalingRoPE"):
        CPUModel(policy.model)


@pytest.mark.parametrize("adapted", [True, False])
def test_one_quantised_layer(tmp_path, adapted):
    policy = made(tmp_path / "model")
    layer = policy.model.layers[1].mlp.up_proj
    quantised = nn.QuantizedLinear.from_linear(layer.linear, 32, 4)
    if adapted:
        layer.linear = quantised
    else:
        policy.model.layers[1].mlp.up_proj = quantised
    with pytest.raises(UnfitError, match="not dense"):
        CPUModel(policy.model)


def test_another_norm(tmp_path):
    policy = made(tmp_path / "model")
    policy.model.layers[1].post_attention_layernorm = nn.LayerNorm(64)
    with pytest.raises(UnfitError, match="norm LayerNorm"):
        CPUModel(policy.model)


def test_windows_in_a_family_that_is_computed_here_otherwise(tmp_path):
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    policy = choose_engine(made(tmp_path / "model", model_type="llama", **windows))
    prompt = np.arange(4, 34, dtype=np.int32)[None]
    expected = np.array(policy.model(mx.array(prompt))[0, -1])
    np.testing.assert_allclose(
        np.array(policy.engine.prefill(prompt, [30]).logits())[0], expected, atol=1e-4
    )


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16])
def test_sixteen_bits_are_left_to_mlx(tmp_path, kind):
    policy = made(tmp_path / "model")
    policy.model.set_dtype(kind)
    with pytest.raises(UnfitError, match="weights in"):
        CPUModel(policy.model)
    assert choose_engine(policy).engine.name == "mlx"


def test_a_model_that_computes_something_else_is_found(policy, monkeypatch):
    assert choose_engine(policy).engine.name == "cpu"
    monkeypatch.setattr(cpu_model.Rope, "rotate", lambda self, x, tables: x)
    told: list[str] = []
    assert choose_engine(policy, warn=told.append).engine.name == "mlx"
    assert "logits differ from MLX's" in told[0]
    with pytest.raises(ConfigError, match=r"model.engine is cpu.*logits differ"):
        choose_engine(policy, "cpu")


def test_a_failure_of_our_own_is_told(policy, monkeypatch):
    monkeypatch.setattr(cpu_model.Rope, "rotate", lambda self, x, tables: x.nothing)
    told: list[str] = []
    assert choose_engine(policy, warn=told.append).engine.name == "mlx"
    assert told == [
        "MLX computes this model, more slowly: NumPy cannot (AttributeError: 'numpy.ndarray' "
        "object has no attribute 'nothing'). Please report this."
    ]


def test_the_engine_may_be_chosen(policy):
    assert choose_engine(policy, "mlx").engine.name == "mlx"
    assert choose_engine(policy, "cpu").engine.name == "cpu"


def test_a_policy_may_be_checked_again(tmp_path):
    assert choose_engine(array_policy(tmp_path / "model", "qwen3")).engine.name == "cpu"


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_views(tmp_path, name):
    policy = array_policy(tmp_path / "model", name)
    assert policy.engine.name == "cpu"
    weights, inner = policy.engine.model.read(), policy.model.model
    block, theirs = weights.blocks[1], inner.layers[1]
    pairs = [
        (weights.embedding, inner.embed_tokens.weight),
        (weights.norm.weight, inner.norm.weight),
        (block.queries_keys_values.weight, theirs.self_attn.q_proj.linear.weight),
        (block.queries_keys_values.weight, theirs.self_attn.v_proj.linear.weight),
        (block.output.weight, theirs.self_attn.o_proj.linear.weight),
        (block.gate_up.weight, theirs.mlp.up_proj.linear.weight),
        (block.down.weight, theirs.mlp.down_proj.linear.weight),
        (weights.head.weight, inner.embed_tokens.weight),
    ]
    for ours, array in pairs:
        assert np.shares_memory(ours, np.array(array, copy=False))
    biased = block.queries_keys_values.bias
    assert (biased is not None) == (name == "qwen2")
    assert (block.query_norm is not None) == (name == "qwen3")


def test_a_head_of_its_own(tmp_path):
    policy = choose_engine(made(tmp_path / "model", model_type="llama", tie_word_embeddings=False))
    assert policy.engine.name == "cpu"
    head = policy.engine.model.read().head.weight
    assert np.shares_memory(head, np.array(policy.model.lm_head.weight, copy=False))


def test_blocks_without_positions_have_a_table_of_their_own(tmp_path):
    policy = array_policy(tmp_path / "model", "smollm3")
    assert policy.engine.name == "cpu"
    first, *others = policy.engine.model.ropes
    assert [other is first for other in others] == [True, True, False]


def test_adapters_that_are_off_are_left_out(tmp_path):
    policy = array_policy(tmp_path / "model", "llama")
    arrays = policy.engine.model
    assert arrays is not None
    assert len(arrays.adapters()) == 2 * 7
    block = policy.model.layers[0]
    order = [getattr(block.self_attn, f"{part}_proj") for part in "qkvo"]
    order += [getattr(block.mlp, f"{part}_proj") for part in ("gate", "up", "down")]
    assert all(a is b for a, b in zip(arrays.adapters(), order, strict=False))
    tokens = np.array([[1, 5, 9, 2]], np.int32)
    with adapters_off(policy.model):
        assert arrays.adapters() == []
        weights = arrays.read()
        assert all(block.queries_keys_values.lora_a is None for block in weights.blocks)
        off = policy.engine.prefill(tokens, [4]).logits()
        expected = np.array(policy.model(mx.array(tokens))[:, -1])
    np.testing.assert_allclose(off, expected, atol=1e-4)
    assert np.abs(policy.engine.prefill(tokens, [4]).logits() - off).max() > 1e-3
    block.self_attn.k_proj.scale = 0.0
    first = arrays.read().blocks[0].queries_keys_values
    assert [adapter is None for adapter in first.adapters] == [False, True, False]
    assert first.lora_a is not None
    assert len(first.lora_a) == 2 * 4
    expected = np.array(policy.model(mx.array(tokens))[:, -1])
    np.testing.assert_allclose(policy.engine.prefill(tokens, [4]).logits(), expected, atol=1e-4)


def test_a_copy_of_the_policy_reads_the_adapters_as_they_are_now(tmp_path):
    policy = array_policy(tmp_path / "model", "qwen3")
    tokens = np.array([[1, 5, 9, 2]], np.int32)
    before = policy.engine.prefill(tokens, [4]).logits()
    tiny.stir(policy.model, 7, size=0.2)
    after = replace(policy).engine.prefill(tokens, [4]).logits()
    assert np.abs(after - before).max() > 1e-3
    expected = np.array(policy.model(mx.array(tokens))[:, -1])
    np.testing.assert_allclose(after, expected, atol=1e-4)
