"""Every engine beside a plain forward pass: logits, forks, draws, forests, gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from exact import assert_exact
from forests import flat_group, forest, scored
from samples import sample
from steps import plan, relative_difference, selection

from localrl.backend import mx
from localrl.engines.choose import choose_engine
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.update import Updater
from localrl.policy.packing import row_batches
from localrl.settings import LearningConfig

CASES = [
    *(("mlx", name) for name in ("qwen3", "llama", "gemma3_text", "gemma4_text", "lfm2")),
    *(("mlx", name) for name in ("qwen3_5", "qwen3_5_moe", "granitemoehybrid")),
    *(("cpu", name) for name in ("qwen3", "llama", "qwen2", "smollm3")),
]
"""Engines and families; gemma3 and gemma4 have windows, the last four are hybrids."""
PROMPTS = (5, 6, 7), (1, 2, 3, 4, 8, 9), (10, 11)
TEMPERATURE = 0.8


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def policy(request, tmp_path_factory):
    """A dense float32 model whose adapters do something."""
    engine, family = request.param
    folder = tmp_path_factory.mktemp("models") / family
    return choose_engine(tiny.make_tiny_policy(folder, **tiny.FAMILIES[family]), engine)


def prefilled(policy, *prompts):
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return policy.engine.prefill(tokens, lengths)


def plain(policy, *rows):
    """Logits after each of these texts, one by one and without a cache."""
    return np.stack([np.array(policy.model(mx.array([row]))[0, -1]) for row in rows])


def close(state, expected):
    np.testing.assert_allclose(state.logits(), expected, atol=2e-4)


def test_logits_after_prompts_of_different_lengths(policy):
    close(prefilled(policy, *PROMPTS), plain(policy, *PROMPTS))


@pytest.mark.parametrize("shared", [True, False])
def test_rows_fork_leave_and_come(policy, shared):
    start = prefilled(policy, *PROMPTS[:2])
    state = start.fork(np.array([0, 1, 1]), [0, 1] if shared else None)
    close(state, plain(policy, PROMPTS[0], PROMPTS[1], PROMPTS[1]))
    state.step(np.array([20, 21, 22]))
    state.select(np.array([2, 0, 2]))
    assert len(state) == 3
    rows = [(*PROMPTS[1], 22), (*PROMPTS[0], 20), (*PROMPTS[1], 22)]
    close(state, plain(policy, *rows))
    state.extend(prefilled(policy, PROMPTS[2]).fork(np.array([0, 0]), [2] if shared else None))
    state.step(np.array([30, 31, 32, 33, 34]))
    rows = [*rows, PROMPTS[2], PROMPTS[2]]
    rows = [(*row, token) for row, token in zip(rows, range(30, 35), strict=True)]
    close(state, plain(policy, *rows))
    state.select(np.array([1, 3]))
    state.step(np.array([40, 41]))
    close(state, plain(policy, (*rows[1], 40), (*rows[3], 41)))
    # What they went on from is as it was.
    again = start.fork(np.array([1]), [1, 0] if shared else None)
    close(again, plain(policy, PROMPTS[1]))


def test_draws_are_of_the_next_logits(policy):
    state = prefilled(policy, *PROMPTS).fork(np.array([0, 1, 2]), None)
    logits = state.logits().astype(np.float64) / TEMPERATURE
    table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    uniforms = np.array([0.1, 0.5, 0.9])
    found = state.sample(uniforms, TEMPERATURE)
    cumulative = np.cumsum(np.exp(table), axis=-1)
    np.testing.assert_array_equal(found.tokens, (cumulative > uniforms[:, None]).argmax(axis=-1))
    np.testing.assert_allclose(found.logprobs, table[np.arange(3), found.tokens], atol=1e-4)
    entropies = -(np.exp(table) * table).sum(axis=-1)
    np.testing.assert_allclose(found.entropies, entropies, atol=1e-4)
    np.testing.assert_allclose(state.entropies(TEMPERATURE), entropies, atol=1e-4)
    greedy = state.sample(None, 0.0)
    np.testing.assert_array_equal(greedy.tokens, logits.argmax(axis=-1))
    np.testing.assert_allclose(greedy.entropies, state.entropies(1.0), atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_fed_ahead_are_those_that_were_drawn(policy, shared):
    state = prefilled(policy, *PROMPTS[:2]).fork(np.array([0, 1, 1]), [0, 1] if shared else None)
    found = state.sample(np.array([0.1, 0.5, 0.9]), TEMPERATURE, ahead=True)
    state.select(np.array([2, 0]))
    rows = [(*PROMPTS[1], int(found.tokens[2])), (*PROMPTS[0], int(found.tokens[0]))]
    close(state, plain(policy, *rows))


def test_what_is_sampled_in_trees_is_what_is_scored(policy):
    assert_exact(policy, sample(policy, roots=2, leaves=8, at=(0, 3, 7), rows=9), TEMPERATURE)


def batch():
    groups = [
        scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0]),
        scored(flat_group(4), [1, 0, 0, 1]),
    ]
    return selection(OBJECTIVES["clipped"], groups).batch


def gradient(policy, *, shared, recomputed=False):
    updater = Updater(policy, LearningConfig(lr=0.0), TEMPERATURE)
    updater.gradient.shared = shared
    return updater.gradient(batch(), replace(plan(4), grad_checkpoint=recomputed))


def test_log_probabilities_of_rows_are_those_of_the_plain_pass(policy):
    for micro in row_batches(batch(), 3):
        found = policy.engine.token_logprobs(micro, temperature=TEMPERATURE, head_chunk=7)
        logits = np.array(policy.model(mx.array(micro.tokens)), np.float64) / TEMPERATURE
        table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = table.reshape(-1, table.shape[-1])[micro.sources, micro.targets]
        np.testing.assert_allclose(np.array(found), expected, atol=1e-4)


def test_the_gradient_is_that_of_plain_rows_in_mlx(policy, request):
    """Forests, and blocks that are computed again, change nothing."""
    expected, total = gradient(choose_engine(policy, "mlx"), shared=False)
    for shared in (False, True):
        found, mine = gradient(policy, shared=shared)
        assert relative_difference(found, expected) < 1e-5
        assert mine.loss == pytest.approx(total.loss, rel=1e-4, abs=1e-6)
        assert policy.engine.check_recompute().accepted
        again, _ = gradient(policy, shared=shared, recomputed=True)
        assert relative_difference(again, expected) < 1e-5


def test_it_says_what_it_is(policy, request):
    engine, _ = request.node.callspec.params["policy"]
    assert policy.engine.name == engine
    assert (policy.engine.kernels is None) == (engine == "mlx")
    numbers = policy.engine.decode_numbers()
    assert numbers is None if engine == "mlx" else numbers > 10_000
