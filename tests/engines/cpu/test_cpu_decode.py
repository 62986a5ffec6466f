"""Rows decoded in NumPy: the samples of MLX, and the logits of whole forward passes."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tiny
from arrays import NAMES, array_policy, in_mlx, spoil
from exact import assert_exact
from forests import scored
from samples import sample
from steps import plan, ragged_group, selection

from localrl.backend import mx
from localrl.engines.choose import choose_engine
from localrl.engines.cpu import buffers, decode
from localrl.engines.cpu.decode import CPUState
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.update import Updater
from localrl.rollouts import decode as rollouts_decode
from localrl.settings import LearningConfig

PROMPTS = (5, 6, 7), (1, 2, 3, 4, 8, 9), (10, 11)


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    return array_policy(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return array_policy(tmp_path_factory.mktemp("models") / "one", "qwen3")


@pytest.fixture
def caches(monkeypatch):
    """Every cache that is made, as it was: the number of its prompts, 0 where rows have copies."""
    made, begin = [], CPUState.__init__

    def seen(self, *given):
        begin(self, *given)
        made.append(len(self.prompts))

    monkeypatch.setattr(CPUState, "__init__", seen)
    return made


def fork(policy, prompts, rows, names=None) -> CPUState:
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    cache = policy.engine.prefill(tokens, lengths).fork(np.array(rows), names)
    assert isinstance(cache, CPUState)
    return cache


def step(state, *tokens):
    """Logits after these."""
    state.step(np.array(tokens))
    return state.logits()


def whole(policy, *rows):
    return np.stack([np.array(policy.model(mx.array([row]))[0, -1]) for row in rows])


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 7, "prefill_rows": 2},
        {"roots": 2, "leaves": 8, "at": (0, 3, 7), "rows": 9},
    ],
    ids=["flat", "refilled", "forks"],
)
def test_the_samples_are_mlxs(family, caches, monkeypatch, shape):
    expected = sample(in_mlx(family), **shape)
    assert not caches
    monkeypatch.setattr(decode, "STEP", 5)
    for shared in (True, False):
        monkeypatch.setattr(rollouts_decode, "SHARED_POSITIONS", 0 if shared else 1 << 30)
        found = sample(family, **shape)
        assert caches
        assert all(bool(prompts) == shared for prompts in caches)
        caches.clear()
        for ours, other in zip(found, expected, strict=True):
            assert ours.leaves == other.leaves
            for a, b in zip(ours.nodes, other.nodes, strict=True):
                assert a.parent == b.parent
                np.testing.assert_array_equal(a.token_ids, b.token_ids)
                np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)
                np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-4)
    assert_exact(family, found, 0.8)


@pytest.mark.parametrize("positions", [0, 1 << 30])
def test_nothing_is_read_before_it_is_written(one, monkeypatch, positions):
    monkeypatch.setattr(rollouts_decode, "SHARED_POSITIONS", positions)
    monkeypatch.setattr(decode, "STEP", 5)
    spoil(monkeypatch)
    shape = {"roots": 2, "leaves": 8, "at": (0, 3, 7), "rows": 9}
    assert_exact(one, sample(one, **shape), 0.8)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_leave_fork_and_come(family, monkeypatch, shared):
    monkeypatch.setattr(decode, "STEP", 2)
    cache = fork(family, PROMPTS[:2], [0, 1, 1], [0, 1] if shared else None)
    cache.step(np.array([20, 21, 22]))
    cache.select(np.array([2, 0, 2]))
    assert len(cache) == 3
    cache.extend(fork(family, PROMPTS[2:], [0, 0], [2] if shared else None))
    found = step(cache, 30, 31, 32, 33, 34)
    rows = [(*PROMPTS[1], 22, 30), (*PROMPTS[0], 20, 31), (*PROMPTS[1], 22, 32)]
    rows += [(*PROMPTS[2], 33), (*PROMPTS[2], 34)]
    np.testing.assert_allclose(found, whole(family, *rows), atol=1e-4)
    assert [prompt.key for prompt in cache.prompts] == ([0, 1, 2] if shared else [])
    cache.select(np.array([1, 3]))
    assert [prompt.key for prompt in cache.prompts] == ([0, 2] if shared else [])
    found = step(cache, 40, 41)
    rows = [(*PROMPTS[0], 20, 31, 40), (*PROMPTS[2], 33, 41)]
    np.testing.assert_allclose(found, whole(family, *rows), atol=1e-4)
    cache.select(np.array([1, 0, 0]))
    cache.step(np.array([50, 51, 52]))
    cache.extend(fork(family, PROMPTS[1:2], [0], [1] if shared else None))
    found = step(cache, 60, 61, 62, 63)
    rows = [(*rows[1], 50, 60), (*rows[0], 51, 61), (*rows[0], 52, 62), (*PROMPTS[1], 63)]
    np.testing.assert_allclose(found, whole(family, *rows), atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_forked_rows_do_not_write_over_each_other(one, shared):
    prefilled = one.engine.prefill(np.array([PROMPTS[1]], np.int32), [6])
    names = [0] if shared else None
    first, second = (prefilled.fork(np.array([0, 0]), names) for _ in range(2))
    first.step(np.array([20, 21]))
    second.step(np.array([22, 23]))
    first.select(np.array([0, 0, 1]))
    found = step(first, 30, 31, 32)
    rows = [(*PROMPTS[1], 20, 30), (*PROMPTS[1], 20, 31), (*PROMPTS[1], 21, 32)]
    np.testing.assert_allclose(found, whole(one, *rows), atol=1e-4)
    found = step(second, 33, 34)
    rows = [(*PROMPTS[1], 22, 33), (*PROMPTS[1], 23, 34)]
    np.testing.assert_allclose(found, whole(one, *rows), atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_many_tokens(one, shared):
    cache = fork(one, PROMPTS[:2], [0, 1], [0, 1] if shared else None)
    tokens = np.random.default_rng(0).integers(4, 60, (2, 140))
    for n in range(140):
        found = step(cache, *tokens[:, n])
        if n in (56, 60, 63, 64, 127, 128, 139):
            rows = [(*p, *t[: n + 1].tolist()) for p, t in zip(PROMPTS, tokens, strict=False)]
            np.testing.assert_allclose(found, whole(one, *rows), atol=2e-4)


def test_rows_of_prompts_that_are_there_bring_no_copies(one):
    cache = fork(one, PROMPTS[:2], [0, 1], [4, 7])
    prompts = list(cache.prompts)
    cache.extend(fork(one, PROMPTS[:2], [1, 1], [4, 7]))
    assert all(a is b for a, b in zip(cache.prompts, prompts, strict=True))
    assert cache.sources.tolist() == [0, 1, 1, 1]


def test_adapters_that_changed_are_seen_by_the_next_decode(tmp_path):
    policy = array_policy(tmp_path / "model", "qwen3")
    before = sample(policy)
    tiny.stir(policy.model, 5, size=0.3)
    after = sample(policy)
    assert_exact(policy, after, 0.8)
    with pytest.raises(AssertionError):
        assert_exact(policy, before, 0.8)


def test_an_update_is_seen_by_the_next_decode(tmp_path):
    policy = array_policy(tmp_path / "model", "llama")
    before = sample(policy)
    made = selection(OBJECTIVES["clipped"], [scored(ragged_group((5, 9)), [0, 1])]).batch
    updater = Updater(policy, LearningConfig(lr=0.01), 0.8)
    assert updater.update(made, plan()).updated
    assert_exact(policy, sample(policy), 0.8)
    with pytest.raises(AssertionError):
        assert_exact(policy, before, 0.8)


@pytest.fixture
def counted(monkeypatch):
    """MLX counts small arrays too."""
    monkeypatch.setattr(buffers, "LARGE", 1)


def active() -> int:
    gc.collect()
    mx.synchronize()  # what an earlier graph held is given back by another thread
    mx.clear_cache()  # a buffer that is used again may be larger than what is in it
    return mx.get_active_memory()


TOKEN = 2 * 2 * 2 * 16 * 4
"""Bytes of a token: 2 layers, keys and values, 2 heads of 16 numbers."""


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_prompts_bytes_do_not_grow_with_its_rows(one, shared):
    prompt = np.random.default_rng(0).integers(4, 40, 500).astype(np.int32)
    prefilled = one.engine.prefill(prompt[None], [500])
    taken = {}
    for rows in (1, 16):
        before = active()
        cache = prefilled.fork(np.zeros(rows, int), [0] if shared else None)
        cache.step(np.full(rows, 30))
        taken[rows] = active() - before
        del cache
        assert active() == before
    # A row's room is whole steps of 64 tokens: one, or eight behind its copy of the prompt.
    each = TOKEN * (64 if shared else 512)
    assert taken[16] - taken[1] == pytest.approx(15 * each, rel=0.05)


@pytest.mark.usefixtures("counted")
def test_prompts_are_forgotten_when_their_rows_have_left(one):
    prompt = np.random.default_rng(0).integers(4, 40, 500).astype(np.int32).tolist()
    start = active()
    cache = fork(one, PROMPTS[:1], [0, 0], [0])
    bare = active()
    cache.extend(fork(one, [prompt], [0], [1]))
    cache.step(np.array([20, 21, 22]))
    assert active() - bare > TOKEN * 500
    cache.select(np.array([0, 1]))
    assert [prompt.key for prompt in cache.prompts] == [0]
    assert active() - bare < TOKEN * 200
    found = step(cache, 30, 31)
    rows = [(*PROMPTS[0], 20, 30), (*PROMPTS[0], 21, 31)]
    np.testing.assert_allclose(found, whole(one, *rows), atol=1e-4)
    del cache
    assert active() == start


def test_more_rows_than_a_step_is_counted_for(tmp_path, monkeypatch):
    """Beyond `FEW` rows results lie in MLX's memory; the samples are the same."""
    policy = array_policy(tmp_path / "model", "qwen3")
    shape = {"rows": 24, "roots": 6, "leaves": 6}
    expected = sample(policy, **shape)
    monkeypatch.setattr(buffers, "FEW", 3)
    monkeypatch.setattr(buffers, "LARGE", 1)
    found = sample(policy, **shape)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.nodes, other.nodes, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.sampled_logprobs, b.sampled_logprobs)


@pytest.mark.parametrize("work", ["fork", "extend"])
def test_layers_grow_one_after_another(tmp_path, monkeypatch, work):
    policy = choose_engine(tiny.make_tiny_policy(tmp_path / "model", num_hidden_layers=8))
    monkeypatch.setattr(buffers, "LARGE", 1)
    tokens = np.arange(60, dtype=np.int32)[None] % 30 + 1
    prefilled = policy.engine.prefill(tokens, [60])
    caches = [prefilled.fork(np.zeros(8, int), None) for _ in range(2)]
    sizes = [sum(k.nbytes + v.nbytes for k, v in cache._layers) for cache in caches]
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    if work == "fork":
        caches[0].select(np.repeat(np.arange(8), 2))
        more = sizes[0]
    else:
        caches[0].extend(caches[1])
        more = sizes[1]
    # What is new at the end, and one layer in both forms.
    layers = len(caches[0]._layers)
    assert mx.get_peak_memory() - before <= more + 1.1 * (sizes[0] + more) / layers
