"""The update in NumPy against the update in MLX."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from arrays import NAMES, array_policy, in_mlx, spoil
from forests import flat_group, forest, scored
from steps import plan, ragged_group, relative_difference, selection

from localrl.backend import mx, tree_flatten
from localrl.engines.choose import choose_engine
from localrl.engines.cpu import attention
from localrl.engines.cpu.attention import Attention, as_columns, as_heads
from localrl.engines.cpu.forward import ForwardPass
from localrl.engines.cpu.sampling import target_logprobs
from localrl.engines.cpu.weights import Weights
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.update import Updater
from localrl.policy.forest_packing import Level
from localrl.policy.packing import forest_batches, row_batches
from localrl.policy.scoring import group_logprobs
from localrl.records import Batch, ScoredGroup
from localrl.settings import LearningConfig

WITH_KL = LearningConfig(clip_low=1.0, clip_high=100.0, kl_coef=0.1)
TEMPERATURE = 0.8


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    return array_policy(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return array_policy(tmp_path_factory.mktemp("models") / "one", "qwen3")


def flat() -> list[ScoredGroup]:
    """Completions of many lengths behind prompts of many lengths."""
    prompts = (1, *range(5, 25), 2), (2,), (7, 8, 9, 10, 2)
    lengths = (5, 1, 9), (3, 4), (12, 2, 2, 7)
    return [
        scored(replace(ragged_group(mine), prompt_ids=prompt), [n % 2 for n in range(len(mine))])
        for prompt, mine in zip(prompts, lengths, strict=True)
    ]


def trees() -> list[ScoredGroup]:
    """A tree of three levels, a shallower one behind a prompt of one token, and a flat group."""
    deep = forest([-1, -1, 0, 0, 3, 3, 1, 1], leaves=[2, 4, 5, 6, 7], planned_roots=2, tokens=9)
    return [
        scored(replace(deep, prompt_ids=(1, *range(5, 25), 2)), [1, 0, 1, 0, 0]),
        scored(replace(forest([-1, -1, 0, 0], [1, 2, 3], 2, 6), prompt_ids=(2,)), [0, 0, 1]),
        scored(flat_group(4), [1, 0, 0, 1]),
    ]


GROUPS = {"flat": flat, "trees": trees}


def batch(kind: str, kl: float = 0.1) -> Batch:
    made = selection(OBJECTIVES["clipped"], GROUPS[kind]()).batch
    nodes = [replace(n, kl_weights=np.full(len(n.token_ids), kl, np.float32)) for n in made.nodes]
    return replace(made, nodes=tuple(nodes))


def gradient(policy, wish, *, shared=True, recomputed=False, micro_rows=8, chunk=16):
    updater = Updater(policy, WITH_KL, TEMPERATURE)
    updater.gradient.shared = shared
    made = replace(plan(micro_rows, chunk), grad_checkpoint=recomputed)
    return updater.gradient(wish, made)


def refuse(*given, **options):
    raise AssertionError("MLX was to compute this")


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("flat", True), ("trees", True), ("trees", False)],
    ids=["flat", "trees", "rows"],
)
def test_loss_and_gradient_are_mlxs(family, kind, shared, monkeypatch):
    expected, total = gradient(in_mlx(family), batch(kind), shared=shared)
    assert min(mx.abs(array).max().item() for _, array in tree_flatten(expected)) > 0
    monkeypatch.setattr(type(family.model.model), "__call__", refuse)
    found, mine = gradient(family, batch(kind), shared=shared)
    assert relative_difference(found, expected) < 1e-5
    # All together, an adapter with a small gradient would not stand out.
    ours = dict(tree_flatten(found))
    for name, array in tree_flatten(expected):
        error = mx.linalg.norm(ours[name] - array) / mx.linalg.norm(array)
        assert error.item() < 1e-4, name
    assert mine.loss == pytest.approx(total.loss, rel=1e-5)
    assert mine.kl == pytest.approx(total.kl, rel=1e-4)
    assert mine.tokens == total.tokens
    assert mine.saved_positions == total.saved_positions
    again, other = gradient(family, batch(kind), shared=shared, recomputed=True)
    assert relative_difference(again, found) < 1e-6
    assert other.loss == pytest.approx(mine.loss, rel=1e-6)


@pytest.mark.parametrize(("rows", "chunk"), [(1, 16), (3, 1), (100, 7)])
def test_micro_batches_and_chunks_change_nothing(one, rows, chunk):
    for shared in (True, False):
        expected, _ = gradient(one, batch("trees"), shared=shared)
        found, _ = gradient(one, batch("trees"), shared=shared, micro_rows=rows, chunk=chunk)
        assert relative_difference(found, expected) < 1e-5


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BUILT = {
    "biases everywhere": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "one head of keys": {"num_key_value_heads": 1},
    "as many heads of keys": {"num_key_value_heads": 4},
    "heads wider than the states": {"head_dim": 32},
    "a head of its own": {"model_type": "llama", "tie_word_embeddings": False},
    "scaled positions": {"model_type": "llama", "rope_traditional": True, "rope_scaling": LLAMA3},
}


@pytest.mark.parametrize("built", list(BUILT))
def test_models_built_otherwise(tmp_path, built):
    policy = choose_engine(tiny.make_tiny_policy(tmp_path / "model", **BUILT[built]))
    assert policy.engine.name == "cpu"
    expected, _ = gradient(in_mlx(policy), batch("trees"))
    found, _ = gradient(policy, batch("trees"))
    assert relative_difference(found, expected) < 1e-5


SOME = {
    "the last block": {"layers": 1},
    "queries and gates": {"keys": ("self_attn.q_proj", "mlp.gate_proj")},
    "values": {"keys": ("self_attn.v_proj",)},
    "outputs": {"keys": ("self_attn.o_proj", "mlp.down_proj")},
    "keys and values of the last block": {
        "keys": ("self_attn.k_proj", "self_attn.v_proj"),
        "layers": 1,
    },
}


@pytest.mark.parametrize("wish", list(SOME))
def test_adapters_on_some_layers(tmp_path, wish):
    policy = array_policy(tmp_path / "model", "qwen2", **SOME[wish])
    for shared in (True, False):
        expected, _ = gradient(in_mlx(policy), batch("trees"), shared=shared)
        found, _ = gradient(policy, batch("trees"), shared=shared, recomputed=shared)
        assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize(("queries", "scores"), [(3, 1), (4, 1 << 20), (128, 300)])
def test_blocks_of_attention_change_nothing(one, monkeypatch, queries, scores):
    expected, total = gradient(one, batch("trees"))
    monkeypatch.setattr(attention, "QUERIES", queries)
    monkeypatch.setattr(attention, "SCORES", scores)
    found, mine = gradient(one, batch("trees"))
    assert relative_difference(found, expected) < 1e-5
    assert mine.loss == pytest.approx(total.loss, rel=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_is_read_before_it_is_written(one, monkeypatch, shared):
    expected, _ = gradient(one, batch("trees"), shared=shared, recomputed=True)
    spoil(monkeypatch)
    found, _ = gradient(one, batch("trees"), shared=shared, recomputed=True)
    assert relative_difference(found, expected) == 0


def test_the_gradients_of_attention_are_mlxs(monkeypatch):
    draws = np.random.default_rng(0)
    sizes = (3, 2, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 4), (3, 2, 2, 5, 4)
    queries, keys, values, grad = (draws.normal(size=s).astype(np.float32) for s in sizes)
    valid = np.array([[True, False], [False, False], [True, True]])
    before = np.broadcast_to(valid[:, None], (3, 5, 2))
    mask = np.concatenate([before, np.broadcast_to(np.tri(5, dtype=bool), (3, 5, 5))], axis=2)

    def attend(q, k, v):
        scores = 0.7 * (q @ k[:, :, None].swapaxes(-1, -2))
        scores = mx.where(mx.array(mask)[:, None, None], scores, -1e30)
        return mx.softmax(scores, axis=-1) @ v[:, :, None]

    arrays = [mx.array(a) for a in (queries, keys, values)]
    out, grads = mx.vjp(attend, arrays, [mx.array(grad)])
    for block, most in ((128, 1 << 20), (2, 1), (3, 60)):
        monkeypatch.setattr(attention, "QUERIES", block)
        monkeypatch.setattr(attention, "SCORES", most)
        heads = Attention(queries, keys, values, valid, 0.7)
        found = heads.forward()
        np.testing.assert_allclose(found, np.array(out[0]), atol=1e-5)
        for mine, theirs in zip(heads.back(found, grad), grads, strict=True):
            np.testing.assert_allclose(mine, np.array(theirs), atol=1e-5)


def test_heads_and_columns():
    # 2 rows of 3 positions; heads 0 and 1 read key head 0, heads 2 and 3 key head 1.
    columns = np.arange(4 * 5 * 6, dtype=np.float32).reshape(20, 6)
    heads = as_heads(columns, 2, 5, 2)
    assert heads.shape == (2, 2, 2, 3, 5)
    np.testing.assert_array_equal(heads[1, 1, 0, 2], columns[10:15, 5])
    np.testing.assert_array_equal(as_columns(heads), columns)


@pytest.mark.parametrize("half", ["lora_a", "lora_b"])
def test_an_entrys_gradient_is_the_losss_difference(tmp_path, half):
    policy = array_policy(tmp_path / "model", "qwen3")
    found, _ = gradient(policy, batch("trees"))
    adapter = policy.model.layers[0].mlp.up_proj
    grads = np.array(found["model"]["layers"][0]["mlp"]["up_proj"][half])
    place = np.unravel_index(np.abs(grads).argmax(), grads.shape)
    whole, losses = np.array(adapter[half]), []
    for step in (0.01, -0.01):
        moved = whole.copy()
        moved[place] += step
        adapter[half] = mx.array(moved)
        wish = batch("trees")
        losses.append(gradient(policy, wish)[1].loss / wish.z)
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(grads[place], rel=0.01)


@pytest.mark.parametrize("shared", [True, False])
def test_log_probabilities_of_groups_are_mlxs(family, shared):
    groups = [s.group for s in (*flat(), *trees())]
    groups.append(flat_group(2, sampled=(True, False, True, True)))
    wish = {"shared": shared, "micro_rows": 3, "head_chunk": 4, "temperature": TEMPERATURE}
    found, expected = (
        group_logprobs(policy, groups, **wish) for policy in (family, in_mlx(family))
    )
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("pack", [forest_batches, row_batches])
def test_what_is_kept_for_a_gradient_changes_no_log_probability(one, pack):
    for micro in pack(batch("trees"), 4):
        plain, kept, recomputed = (
            np.array(
                one.engine.token_logprobs(micro, temperature=TEMPERATURE, head_chunk=9, **wish)
            )
            for wish in ({}, {"gradient": True}, {"gradient": True, "recompute": True})
        )  # fmt: skip
        np.testing.assert_array_equal(kept, plain)
        np.testing.assert_array_equal(recomputed, plain)


def test_states_and_the_models_adapters_stay_what_they_were(one):
    before = {name: np.array(a) for name, a in tree_flatten(one.model.parameters())}
    gradient(one, batch("trees"))
    gradient(one, batch("trees"), recomputed=True)
    for name, array in tree_flatten(one.model.parameters()):
        np.testing.assert_array_equal(np.array(array), before[name])


def test_padding_changes_nothing_before_it(one):
    tokens = np.array([[5, 6, 7, 0, 0], [1, 2, 3, 4, 8]], np.int32)
    level = Level(tokens, np.array([3, 5], np.int32), np.zeros(0, np.int32))
    both = ForwardPass(one.engine.model, [level], keep=False).forward()
    alone = Level(tokens[:1, :3], np.array([3], np.int32), np.zeros(0, np.int32))
    np.testing.assert_allclose(
        both[:, :3], ForwardPass(one.engine.model, [alone], keep=False).forward(), atol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_no_more_logits_than_a_chunk_at_once(one, monkeypatch, chunk):
    sizes, logits = [], Weights.logits

    def count(self, states):
        sizes.append(states.shape[1])
        return logits(self, states)

    monkeypatch.setattr(Weights, "logits", count)
    gradient(one, batch("flat", kl=0.0), chunk=chunk, micro_rows=100)
    trained = sum(int(node.trained.sum()) for node in batch("flat", kl=0.0).nodes)
    assert max(sizes) == min(chunk, trained)
    assert sum(sizes) == trained  # on the way back the vocabulary is not met again


def test_small_weights_of_a_large_vocabulary_are_not_lost():
    """Added one after another in float32, e ** -17 would be nothing beside 1."""
    logits = np.full((2, 200_000), -17, np.float32)
    logits[:, 0] = 0
    exact = 1 + 199_999 * np.exp(-17.0)
    found = target_logprobs(logits, np.zeros(2, int), 1.0)
    np.testing.assert_allclose(np.exp(-found.astype(np.float64)), exact, rtol=1e-6)


def test_adapters_of_scale_0_are_scored_without_a_gradient(tmp_path):
    policy = array_policy(tmp_path / "model", "qwen3", scale=0.0)
    (micro,) = forest_batches(batch("flat"), 100)
    found = policy.engine.token_logprobs(micro, temperature=1.0, head_chunk=7, gradient=True)
    expected = in_mlx(policy).engine.token_logprobs(micro, temperature=1.0, head_chunk=7)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)
