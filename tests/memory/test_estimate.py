"""What a run takes, by its sizes: worked by hand, against MLX's own counters, and in its form."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from localrl.backend import mx
from localrl.engines.cpu import attention
from localrl.engines.cpu import memory as cpu_memory
from localrl.engines.cpu.memory import fits
from localrl.engines.memory import engines_for
from localrl.engines.mlx import memory as mlx_memory
from localrl.engines.mlx.memory import MLXMemory, head_bytes, recomputes_scores
from localrl.engines.open import make_policy
from localrl.learning.update import Updater
from localrl.memory.estimate import (
    OTHER,
    Coefficients,
    Workload,
    estimate,
    paths_at_once,
    told,
)
from localrl.memory.sizes import FULL, NONE, read_sizes
from localrl.policy.model import load_model
from localrl.records import MemoryPlan
from localrl.settings import LearningConfig
from localrl.training.memory_plan import sizes_of

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
SIZES = read_sizes(CONFIG)
WORKLOAD = Workload(
    prompts=4,
    evaluated=0,
    leaves=8,
    forks=False,
    turns=False,
    rank=8,
    lora_layers=0,
    lora_keys=(),
    float_bytes=4,
    engines=engines_for("auto", device="cpu"),
)
TREE = replace(WORKLOAD, forks=True)
PLAN = MemoryPlan(
    group_size=8,
    decode_rows=32,
    prefill_rows=4,
    micro_rows=4,
    head_chunk=64,
    max_prompt_tokens=100,
    max_completion_tokens=156,
    grad_checkpoint=False,
    dequantise=True,
    threads=None,
    predicted_bytes=None,
    limit_bytes=None,
    reason="",
)
TOKEN = 2 * 4 * 32 * 3 * 4
"""Bytes of a token's keys and values: 4 heads of 32 numbers in 3 blocks, float32."""


def test_caches_by_hand():
    found = estimate(SIZES, WORKLOAD, PLAN)
    assert found.prompts == 4 * 128 * TOKEN  # 100 tokens in steps of 64
    assert found.caches == 32 * 256 * TOKEN * 4 // 3  # while one block of three grows
    fewer = estimate(SIZES, WORKLOAD, replace(PLAN, decode_rows=8, prefill_rows=1))
    assert fewer.prompts == 128 * TOKEN
    assert fewer.caches == 8 * 256 * TOKEN * 4 // 3
    half = estimate(SIZES, replace(WORKLOAD, float_bytes=2), PLAN)
    assert (half.prompts, half.caches) == (found.prompts // 2, found.caches // 2)


def test_no_more_rows_than_there_are_completions():
    assert estimate(SIZES, WORKLOAD, replace(PLAN, decode_rows=99)).caches == (
        estimate(SIZES, WORKLOAD, PLAN).caches
    )
    many = estimate(SIZES, replace(WORKLOAD, evaluated=50), replace(PLAN, decode_rows=99))
    assert many.caches == 50 * 256 * TOKEN * 4 // 3
    assert paths_at_once(WORKLOAD, replace(PLAN, micro_rows=99)) == 32


def test_weights_and_adapters_by_hand():
    matrices = 3 * (2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 256)
    norms = 3 * (2 * 128 + 2 * 32) + 128
    found = estimate(SIZES, WORKLOAD, PLAN)
    assert found.weights == 4 * (1000 * 128 + matrices + norms)
    adapter = 4 * 8 * 3 * (2 * (128 + 256) + 2 * (128 + 128) + 3 * (128 + 256))
    assert found.adapters == 3 * adapter  # with two moments
    given = estimate(SIZES, replace(WORKLOAD, reference=True), PLAN)
    assert given.adapters == 4 * adapter  # and those that the KL is measured from
    assert found.stays == found.weights + found.adapters + OTHER


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_what_stays_is_what_mlx_holds_after_loading(tmp_path, bits, dense):
    changes = {key: value for key, value in CONFIG.items() if key != "model_type"}
    wide = {**changes, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 3000}
    folder = tiny.make_folder(tmp_path, bits=bits, **wide)
    gc.collect()
    mx.clear_cache()  # a buffer that is used again may be larger than what is in it
    before = mx.get_active_memory()
    loaded = load_model(folder)
    policy = make_policy(loaded, rank=8, scale=1.0, seed=0, for_cpu=True, dense=dense)
    del loaded
    updater = Updater(policy, LearningConfig(), 1.0)
    updater.optimizer.init(policy.model.trainable_parameters())
    mx.eval(policy.model.parameters(), updater.optimizer.state)
    if bits and not dense:  # MLX computes it, and keeps the adapters once more
        policy.engine.prefill(np.array([[5, 6]]), [2])
    gc.collect()
    found = estimate(sizes_of(folder, 0), WORKLOAD, replace(PLAN, dequantise=dense))
    held = mx.get_active_memory() - before
    assert found.stays - OTHER == pytest.approx(held, rel=0.05)


def lengths(field, workload=WORKLOAD, **changes):
    """A part's bytes at completions of 64, 128, 192, ... tokens."""
    plans = [replace(PLAN, max_completion_tokens=64 * n, **changes) for n in range(1, 7)]
    return [getattr(estimate(SIZES, workload, plan), field) for plan in plans]


def differences(values):
    return [b - a for a, b in pairwise(values)]


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("workload", [WORKLOAD, TREE], ids=["flat", "tree"])
def test_the_update_is_a_polynomial_of_the_second_degree(workload, grad_checkpoint):
    workload = replace(workload, float_bytes=2)  # MLX computes it, on Metal
    once = {"workload": workload, "grad_checkpoint": grad_checkpoint, "head_chunk": 1}
    linear, quadratic = lengths("linear", **once), lengths("quadratic", **once)
    assert all(abs(d) <= 4 for d in differences(differences(linear)))  # rounded to bytes
    second = differences(differences(quadratic))
    assert min(second) > 0
    assert max(second) - min(second) <= 4
    assert lengths("head", **once) == [0] * 6
    gradients = estimate(SIZES, workload, PLAN).gradients
    stays = estimate(SIZES, workload, PLAN).stays
    parts = [stays + sum(two) + gradients for two in zip(linear, quadratic, strict=True)]
    assert all(peak >= part for peak, part in zip(lengths("peak", **once), parts, strict=True))


def test_all_leaves_of_a_tree_are_learned_from_together():
    one = replace(PLAN, micro_rows=1)
    assert paths_at_once(TREE, one) == 8
    assert estimate(SIZES, TREE, one) == estimate(SIZES, TREE, replace(one, micro_rows=8))
    assert estimate(SIZES, TREE, one).update > estimate(SIZES, WORKLOAD, one).update
    assert estimate(SIZES, TREE, one).rollout == estimate(SIZES, WORKLOAD, one).rollout


def test_each_turn_reads_its_path_again():
    turns = replace(WORKLOAD, turns=True)
    found, plain = estimate(SIZES, turns, PLAN), estimate(SIZES, WORKLOAD, PLAN)
    assert found.prompts == 4 * 256 * TOKEN
    assert found.drawing > plain.drawing
    assert (found.caches, found.update) == (plain.caches, plain.update)


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_agents_may_have_a_prompt_for_each_completion(name):
    plain = replace(WORKLOAD, engines=engines_for(name, device="cpu"))
    own = replace(plain, own_prompts=True)
    found, shared = estimate(SIZES, own, PLAN), estimate(SIZES, plain, PLAN)
    one = replace(PLAN, group_size=1)
    assert found.update > shared.update
    assert (found.linear, found.quadratic) == (
        estimate(SIZES, plain, one).linear,
        estimate(SIZES, plain, one).quadratic,
    )


@pytest.mark.parametrize("name", ["qwen3", "lfm2", "qwen3_5", "gemma4_text"])
def test_shared_prompts_count_once(name):
    """In every family: four paths of a tree take less than four times one path."""
    long, sizes = (
        replace(PLAN, max_prompt_tokens=400),
        read_sizes(tiny.CONFIG | tiny.FAMILIES[name]),
    )
    one, four = (
        estimate(sizes, WORKLOAD, replace(long, micro_rows=rows)).linear for rows in (1, 4)
    )
    assert one < four < 3 * one


@pytest.mark.parametrize("workload", [WORKLOAD, TREE], ids=["flat", "tree"])
def test_recomputing_blocks_takes_less(workload):
    for size in (2, 4):
        plans = (replace(PLAN, grad_checkpoint=on) for on in (False, True))
        plain, again = (
            estimate(SIZES, replace(workload, float_bytes=size), plan) for plan in plans
        )
        assert again.linear < plain.linear
        assert again.quadratic < plain.quadratic or size == 4
        assert again.rollout == plain.rollout


def test_in_numpy_scores_are_of_one_part_of_the_queries(monkeypatch):
    monkeypatch.setattr(attention, "kernels", None)
    rows = {"head_chunk": 1, "micro_rows": 1}
    linear, scores = lengths("linear", **rows), lengths("quadratic", **rows)
    assert all(abs(d) <= 4 for d in differences(differences(linear)[4:]))
    # From 128 queries on, no more but for the keys they see: 8 heads of 64 more, twice, in float32.
    assert differences(scores)[1:] == [2 * 4 * 8 * 128 * 64] * 4


def test_in_c_there_are_hardly_any_scores(monkeypatch):
    monkeypatch.setattr(attention, "kernels", SimpleNamespace())
    assert lengths("quadratic") == [0] * 6
    assert all(attention.attends_in_c(size) == (size % 16 == 0) for size in (8, 16, 24, 128))
    monkeypatch.setattr(attention, "kernels", None)
    assert min(lengths("quadratic")) > 0


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32])
def test_where_attention_is_in_c_is_known(head_dim):
    states, hidden = np.zeros((1, 1, 1, 4, head_dim), np.float32), np.ones((1, 0), bool)
    heads = attention.Attention(states, states[:, 0], states[:, 0], hidden, 1.0)
    assert (heads._steps is not None) == attention.attends_in_c(head_dim)


def test_buffers_in_wait_are_at_most_the_work_of_a_block(monkeypatch):
    one = replace(PLAN, micro_rows=1, max_completion_tokens=64, head_chunk=1)
    many = replace(PLAN, max_completion_tokens=4096, head_chunk=1)
    found = [estimate(SIZES, WORKLOAD, plan).linear for plan in (one, many)]
    monkeypatch.setattr(cpu_memory, "SPARE", 0)
    without = [estimate(SIZES, WORKLOAD, plan).linear for plan in (one, many)]
    assert 0 < found[0] - without[0] < without[0]
    assert found[1] - without[1] == 16 << 20


def test_numpy_computes_what_it_can():
    four = {"quantization": {"bits": 4, "group_size": 64}}
    assert fits(SIZES, float_bytes=4, dense=False)
    assert not fits(SIZES, float_bytes=2, dense=True)
    assert fits(read_sizes(CONFIG | four), float_bytes=4, dense=True)
    assert not fits(read_sizes(CONFIG | four), float_bytes=4, dense=False)
    gemma = CONFIG | {"model_type": "gemma3_text", "sliding_window": 8}
    assert not fits(read_sizes(gemma), float_bytes=4, dense=True)


@pytest.mark.parametrize(
    ("device", "version", "found"),
    [
        ("metal", "0.32.2", False),
        ("metal", "0.32.3", False),
        ("metal", "0.32.4", True),
        ("metal", "0.33.0.dev20261101", True),
        ("metal", "1.0", True),
        ("cpu", "0.32.4", False),
        ("cuda", "0.32.4", False),
    ],
)
def test_where_causal_attention_recomputes_its_scores(monkeypatch, device, version, found):
    assert recomputes_scores(device, version) is found
    monkeypatch.setenv("MLX_SDPA_VJP_FALLBACK", "1")
    assert not recomputes_scores(device, version)


WIDE = replace(SIZES, head_dim=64, windows=(NONE, FULL, FULL))
"""With heads of a size for which MLX has that gradient, in two of three layers."""
COMPLETIONS = 2 * 8 * 4 * 156 * (100 + 156)
"""Bytes of the scores of 4 completions' queries, of 8 heads in 16 bits: their mask is an array."""


def quadratic(sizes, *, tiled, plan=PLAN):
    engines = (MLXMemory(tiled),)
    return estimate(sizes, replace(WORKLOAD, float_bytes=2, engines=engines), plan).quadratic


def test_recomputed_scores_are_those_of_a_prompt():
    """Both layers with attention keep scores, and the current block holds one and a half more."""
    prompts = 2 * 8 * 1 * 100**2
    assert quadratic(WIDE, tiled=False) == 3.5 * (COMPLETIONS + prompts)
    assert quadratic(WIDE, tiled=True) == 3.5 * COMPLETIONS
    recomputed = replace(PLAN, grad_checkpoint=True)
    assert quadratic(WIDE, tiled=True, plan=recomputed) < 3.5 * COMPLETIONS


def test_a_tile_of_recomputed_scores_has_a_largest_size():
    """Of a long prompt's scores one block holds three tiles of 1,024 x 1,024 positions."""
    long = replace(PLAN, max_prompt_tokens=3000, max_completion_tokens=1)
    completions = 2 * 8 * 4 * 3001
    assert quadratic(WIDE, tiled=True, plan=long) == 2 * completions + 3 * 2 * 8 * 1024**2


def test_other_scores_are_kept():
    """Those of families with windows, and of heads without such a gradient."""
    windows = replace(WIDE, windows=(NONE, FULL, 64))
    for sizes in (SIZES, windows, replace(WIDE, head_dim=32)):
        assert quadratic(sizes, tiled=True) == quadratic(sizes, tiled=False)


# By hand, of width 64, 4 heads and 2 of keys and values of 16 numbers, inner width 128: arrays kept
# for a token. Attention without norms of heads: 4 of 64, 2 of 64, 2 of 32; the layer after it: 4 of
# 128. Norms of heads keep 64 and 32 more.
PLAIN = 4 * 64 + 2 * 64 + 2 * 32 + 4 * 128
NORMED = PLAIN + 64 + 32
KEPT = {
    "llama": 2 * PLAIN,
    "qwen3": 2 * NORMED,
    # A convolution computes three arrays of 64, and keeps its output and the product with it.
    "lfm2": NORMED + 2 * (4 * 64 + 5 * 64 + 4 * 128),
    # Queries, keys and values of 4 x 64 + 2 x 2 x 64, a gate of 4 x 64, two of 4 numbers.
    "qwen3_5": NORMED + 3 * 64 + 3 * (4 * 64 + 4 * (768 + 8) + 4 * 128),
    # Norms after attention and feed-forward, GELU, embeddings of 32 per layer; global heads of 32;
    # the second pair of layers is twice as wide inside, and has no keys of its own.
    "gemma4_text": 4 * ((4 + 4) * 64 + 7 * 32)
    + (3 * 64 + 4 * 32 + 7 * 128)
    + (3 * 128 + 4 * 64 + 7 * 128)
    + (3 * 64 + 7 * 256)
    + (3 * 128 + 7 * 256),
}


@pytest.mark.parametrize("name", KEPT)
def test_of_every_block_what_it_computes_is_kept(name):
    """Hand-worked: 64 tokens less in every completion of 4, without scores of attention."""
    sizes = read_sizes(tiny.CONFIG | tiny.FAMILIES[name])
    plan, less = PLAN, replace(PLAN, max_completion_tokens=PLAN.max_completion_tokens - 64)
    memory, workload = MLXMemory(), replace(WORKLOAD, rank=0)
    found, before = (memory.update(sizes, workload, p)[0] for p in (plan, less))
    inner = 256 if name == "gemma4_text" else 128
    states = mlx_memory.CHUNK_STATES * sizes.state_numbers / 32
    numbers = KEPT[name] + mlx_memory.ONE_BLOCK * inner + states
    assert found - before == pytest.approx(4 * 4 * 64 * numbers)


def test_recurrent_layers_keep_a_state_for_each_chunk():
    sizes = read_sizes(tiny.CONFIG | tiny.FAMILIES["granitemoehybrid"])
    long = replace(PLAN, max_prompt_tokens=1000, max_completion_tokens=100)
    state, chunks = 8 * 16 * 16, (1000 + 4 * 100) / 64
    ends = mlx_memory.ROW_STATES * 2 * 5
    for again, layers in ((False, 2), (True, 1)):
        plan = replace(long, grad_checkpoint=again)
        found = mlx_memory.recurrent_bytes(sizes, plan, paths=4, trees=1)
        kept = layers * mlx_memory.CHUNK_STATES * chunks
        assert found == pytest.approx(4 * state * (kept + ends))


def test_capped_logits_take_more():
    assert head_bytes(50, 50, 1000, capped=True) - head_bytes(50, 50, 1000) == pytest.approx(
        mlx_memory.HEAD_CAPPED * 4 * 50 * 1000
    )


def test_nothing_is_learned_where_nothing_trains():
    found = estimate(SIZES, replace(WORKLOAD, trains=False), PLAN)
    assert found.optimizer == found.linear == found.quadratic == found.head == 0
    assert found.rollout == estimate(SIZES, WORKLOAD, PLAN).rollout


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4_text", "granitemoehybrid"])
def test_more_never_takes_less_in_hybrids(name):
    sizes = read_sizes(tiny.CONFIG | tiny.FAMILIES[name])
    for plan in (PLAN, replace(PLAN, grad_checkpoint=True)):
        was = estimate(sizes, WORKLOAD, plan).peak
        for change in ("micro_rows", "max_prompt_tokens", "max_completion_tokens"):
            for times in (2, 3, 8):
                more = replace(plan, **{change: times * getattr(plan, change)})
                assert estimate(sizes, WORKLOAD, more).peak >= was, change


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("workload", [WORKLOAD, TREE], ids=["flat", "tree"])
def test_more_never_takes_less(workload, grad_checkpoint):
    plan = replace(PLAN, grad_checkpoint=grad_checkpoint)
    was = estimate(SIZES, workload, plan).peak
    for name in ("decode_rows", "prefill_rows", "micro_rows", "max_prompt_tokens",
                 "max_completion_tokens", "head_chunk"):  # fmt: skip
        for times in (2, 3, 8):
            more = replace(plan, **{name: times * getattr(plan, name)})
            assert estimate(SIZES, workload, more).peak >= was, name
    for name in ("prompts", "evaluated", "rank", "leaves"):
        more = replace(workload, **{name: 3 * getattr(workload, name) + 30})
        assert estimate(SIZES, more, plan).peak >= was, name
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        more = read_sizes({**CONFIG, name: 3 * CONFIG[name]})
        assert estimate(more, workload, plan).peak > was, name


def test_a_chunk_bounds_the_logits():
    assert head_bytes(10**9, 50, 1000) == head_bytes(50, 50, 1000)
    for chunk in (1, 16, 50):
        assert head_bytes(2 * chunk, 400, 1000) >= head_bytes(chunk, 400, 1000)
    # However many chunks there are, a few of them exist at once.
    assert head_bytes(16, 10**9, 1000) == head_bytes(16, 10**6, 1000)


@pytest.mark.parametrize("part", ["linear", "quadratic", "head"])
def test_measured_factors_scale_their_parts_alone(part, monkeypatch):
    monkeypatch.setattr(attention, "kernels", None)  # in C there are no scores
    wide = replace(PLAN, head_chunk=10**6)
    vast = replace(SIZES, vocabulary=10**6)
    plain = vars(estimate(vast, WORKLOAD, wide))
    found = vars(estimate(vast, WORKLOAD, wide, Coefficients(**{part: 3.0})))
    assert plain[part] > 0
    assert found.pop(part) == pytest.approx(3 * plain.pop(part), abs=3)
    assert found == plain


def test_parts_that_are_told_have_names_of_their_own():
    found = estimate(SIZES, WORKLOAD, PLAN)
    parts = dict(told(found))
    assert len(parts) == len(list(told(found)))
    assert parts["weights"] == found.weights
    assert all(size >= 0 for size in parts.values())
