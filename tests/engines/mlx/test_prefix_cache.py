"""Prompts stored once: the same samples as with whole caches, and fewer bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from exact import assert_exact
from samples import sample

from localrl.backend import mx
from localrl.engines.choose import choose_engine
from localrl.engines.mlx import prefix_cache
from localrl.engines.mlx.prefix_cache import PrefixCache, RowsByPrompt, fork_prompts
from localrl.rollouts import decode
from localrl.rollouts.batch import TreeRequest
from localrl.rollouts.decode import Decoder

LAYERS = {"qwen3": 2, "llama": 2, "gemma3_text": 1, "lfm2": 1}
"""Families, and how many layers of each share prompts; the others have windows of 8 tokens or
convolutions."""


def in_mlx(policy):
    """Checked."""
    return choose_engine(policy, "mlx")


@pytest.fixture(scope="module", params=list(LAYERS))
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    return in_mlx(tiny.make_tiny_policy(folder, **tiny.FAMILIES[request.param]))


@pytest.fixture(scope="module")
def sharing(policy):
    return in_mlx(policy)


@pytest.fixture
def always(monkeypatch):
    """Share however short prompts are; the list gets every cache of shared prompts."""
    made = []

    class Seen(PrefixCache):
        def __init__(self, *parts):
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(decode, "SHARED_POSITIONS", 0)
    monkeypatch.setattr(prefix_cache, "PrefixCache", Seen)
    return made


def prefill(policy, *prompts):
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.array([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts])
    return policy.engine.prefill(tokens, lengths).cache


def step(policy, cache, tokens):
    return np.array(policy.model(mx.array(tokens)[:, None], cache=cache)[:, -1])


def whole(policy, *rows):
    return np.stack([np.array(policy.model(mx.array([row]))[0, -1]) for row in rows])


@pytest.mark.exact
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 7, "prefill_rows": 2},
        {"roots": 2, "leaves": 8, "at": (0, 3, 7), "rows": 9},
    ],
    ids=["flat", "refilled", "forks"],
)
def test_the_samples_are_those_of_whole_caches(family, always, shape):
    copying = replace(family.engine, shares_prompts=False)
    expected = sample(replace(family, engine=copying), **shape)
    assert not always
    found = sample(family, **shape)
    assert always
    assert_exact(family, found, 0.8)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.nodes, other.nodes, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)


def test_only_layers_of_full_attention_share(family):
    cache = fork_prompts(prefill(family, (5, 6, 7)), np.zeros(3, int), [0])
    name = type(family.model).__module__.rpartition(".")[2]
    assert sum(isinstance(layer, PrefixCache) for layer in cache) == LAYERS[name]


def test_sixteen_bits_are_summed_in_float32(tmp_path):
    policy = tiny.make_tiny_policy(tmp_path / "model")
    expected = whole(policy, (5, 6, 7, 8, 30), (5, 6, 7, 8, 31))
    policy.model.set_dtype(mx.float16)
    policy = choose_engine(policy, "mlx")
    cache = fork_prompts(prefill(policy, (5, 6, 7, 8)), np.zeros(2, int), [0])
    assert cache[0].prompts.keys.dtype == mx.float16
    np.testing.assert_allclose(step(policy, cache, [30, 31]), expected, atol=0.01)


def test_the_softmax_is_one_over_prompt_and_tail():
    # One head of size 1. Scores: 0 and log 2 in the prompt, log 5 in the tail; values 1, 2 and 8.
    prompts = prefix_cache.SharedPrompts(
        (0,), mx.array([0.0, np.log(2)])[None, None, :, None], mx.ones((1, 1, 2, 1)), np.array([2])
    )
    prompts = replace(prompts, values=mx.array([1.0, 2.0])[None, None, :, None])
    cache = PrefixCache(prompts, np.zeros(1, int), 64)
    keys, values = cache.update_and_fetch(
        mx.full((1, 1, 1, 1), np.log(5)), mx.full((1, 1, 1, 1), 8.0)
    )
    found = prefix_cache._attend(mx.ones((1, 1, 1, 1)), keys, values, cache, 1.0, None)
    assert found.item() == pytest.approx((1 * 1 + 2 * 2 + 5 * 8) / 8)


@pytest.mark.parametrize("far", [-500.0, 500.0])
def test_scores_far_apart_give_numbers(far):
    prompts = prefix_cache.SharedPrompts(
        (0,), mx.full((1, 1, 1, 1), far), mx.full((1, 1, 1, 1), 3.0), np.array([1])
    )
    cache = PrefixCache(prompts, np.zeros(1, int), 64)
    keys, values = cache.update_and_fetch(mx.zeros((1, 1, 1, 1)), mx.full((1, 1, 1, 1), 7.0))
    found = prefix_cache._attend(mx.ones((1, 1, 1, 1)), keys, values, cache, 1.0, None)
    assert found.item() == pytest.approx(3.0 if far > 0 else 7.0)


def test_rows_by_prompt():
    by_prompt = RowsByPrompt(np.array([1, 0, 1, 1]), 2)
    rows = mx.arange(4.0)[:, None, None, None]
    seated = np.array(by_prompt.group(rows))[:, 0, :, 0]
    assert by_prompt.each == 3
    assert seated[0, 0] == 1
    assert seated[1].tolist() == [0, 2, 3]
    np.testing.assert_array_equal(
        np.array(by_prompt.ungroup(by_prompt.group(rows))), np.array(rows)
    )


def test_rows_leave_fork_and_come_and_prompts_with_them(sharing):
    prompts = (5, 6, 7), (1, 2, 3, 4, 8, 9), (10, 11)
    cache = fork_prompts(prefill(sharing, *prompts[:2]), np.array([0, 1, 1]), [0, 1])
    keys = cache[0].prompts.keys
    step(sharing, cache, [20, 21, 22])
    for layer in cache:
        layer.filter(mx.array([2, 0, 2]))
    assert cache[0].prompts.keys is keys  # both are still needed: nothing is copied
    more = fork_prompts(prefill(sharing, prompts[2]), np.array([0, 0]), [2])
    for layer, other in zip(cache, more, strict=True):
        layer.extend(other)
    found = step(sharing, cache, [30, 31, 32, 33, 34])
    rows = [(*prompts[1], 22, 30), (*prompts[0], 20, 31), (*prompts[1], 22, 32)]
    rows += [(*prompts[2], 33), (*prompts[2], 34)]
    np.testing.assert_allclose(found, whole(sharing, *rows), atol=1e-4)
    assert cache[0].prompts.prompt_keys == (0, 1, 2)
    for layer in cache:
        layer.filter(mx.array([1, 3]))
    assert cache[0].prompts.prompt_keys == (0, 2)
    assert cache[0].prompts.keys.shape[2] == 3  # without the padding that the longest one asked for
    found = step(sharing, cache, [40, 41])
    rows = [(*prompts[0], 20, 31, 40), (*prompts[2], 33, 41)]
    np.testing.assert_allclose(found, whole(sharing, *rows), atol=1e-4)


def test_rows_of_prompts_that_are_there_bring_no_copies(sharing):
    prefilled = prefill(sharing, (5, 6, 7), (8, 9, 10))
    cache = fork_prompts(prefilled, np.array([0, 1]), [4, 7])
    keys = cache[0].prompts.keys
    for layer, other in zip(cache, fork_prompts(prefilled, np.array([1, 1]), [4, 7]), strict=True):
        layer.extend(other)
    assert cache[0].prompts.keys is keys
    assert cache[0].rows.tolist() == [0, 1, 1, 1]


def test_a_prompts_bytes_do_not_grow_with_its_rows(sharing):
    prompt = tuple(np.random.default_rng(0).integers(4, 40, 500).tolist())
    bytes_of = {}
    for rows in (1, 16):
        cache = fork_prompts(prefill(sharing, prompt), np.zeros(rows, int), [0])
        step(sharing, cache, [30] * rows)
        bytes_of[rows] = sum(array.nbytes for layer in cache for array in layer.state)
    # 2 layers, keys and values, 2 heads of 16 numbers of 4 bytes; a tail grows by 64 tokens. The
    # offsets are 4 bytes for each row.
    token = 2 * 2 * 2 * 16 * 4
    assert bytes_of[1] == token * (500 + 64) + 2 * 4
    assert bytes_of[16] == token * (500 + 16 * 64) + 2 * 4 * 16


@pytest.mark.parametrize(
    ("length", "requests", "rows", "expected"),
    [
        (1023, 1, 8, False),
        (1024, 1, 8, True),  # a copy of 1,024 positions
        (64, 16, 32, True),
        (64, 16, 31, False),  # not all at once
    ],
)
def test_short_prompts_are_copied(sharing, always, monkeypatch, length, requests, rows, expected):
    monkeypatch.setattr(decode, "SHARED_POSITIONS", 1024)
    wanted = [TreeRequest(i, ("test", i), 2, 2, 2) for i in range(requests)]
    Decoder(sharing, 1.0, rows).decode([[5] * length] * requests, wanted)
    assert bool(always) == expected


def test_several_tokens_windows_and_sinks_are_refused(sharing):
    cache = fork_prompts(prefill(sharing, (5, 6, 7)), np.zeros(1, int), [0])
    with pytest.raises(ValueError, match="one token at a time"):
        sharing.model(mx.array([[5, 6]]), cache=cache)
    with pytest.raises(ValueError, match="without windows"):
        cache[0].make_mask(1, window_size=8)
    one = mx.ones((1, 2, 1, 16))
    with pytest.raises(ValueError, match="plain attention"):
        prefix_cache._attend(one, one, one, cache[0], 1.0, None, mx.ones(2))


def test_a_family_that_does_not_ask_for_attention_keeps_whole_caches(policy, monkeypatch):
    import sys

    from mlx_lm.models import base

    assert choose_engine(policy, "mlx").engine.shares_prompts
    family = sys.modules[type(policy.model).__module__]

    def own(queries, keys, values, cache, **options):
        return base.scaled_dot_product_attention(queries, keys, values, cache, **options)

    monkeypatch.setattr(family, "scaled_dot_product_attention", own)
    assert not choose_engine(policy, "mlx").engine.shares_prompts


def test_a_wrong_attention_is_found(policy, monkeypatch):
    monkeypatch.setattr(prefix_cache.SharedPrompts, "mask", None)  # padding counts as tokens
    assert not choose_engine(policy, "mlx").engine.shares_prompts
