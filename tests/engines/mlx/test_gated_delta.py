"""The gated delta rule over chunks beside mlx-lm's loop over tokens: values, gradients, memory."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
from forests import flat_group, scored
from steps import plan, selection

from localrl.backend import mx
from localrl.engines.mlx.gated_delta import CHUNK, _inverse, gated_delta
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.update import Updater
from localrl.settings import LearningConfig


def draw(tokens, *, rows=2, key_heads=2, heads=4, key_size=16, size=8, seed=0):
    """Normalised queries and keys, values, log decays of 0 to -27, rates, and a state."""
    keys = iter(mx.random.split(mx.random.key(seed), 6))
    q, k = (mx.random.normal((rows, tokens, key_heads, key_size), key=next(keys)) for _ in "qk")
    q, k = (array / mx.linalg.norm(array, axis=-1, keepdims=True) for array in (q, k))
    return (
        q / key_size**0.5,
        k,
        mx.random.normal((rows, tokens, heads, size), key=next(keys)),
        -(mx.random.uniform(0, 3, (rows, tokens, heads), key=next(keys)) ** 3),
        mx.sigmoid(2 * mx.random.normal((rows, tokens, heads), key=next(keys))),
        mx.random.normal((rows, heads, size, key_size), key=next(keys)) / 4,
    )


def loop(q, k, v, log_g, beta, state):
    from mlx_lm.models.gated_delta import gated_delta_ops

    return gated_delta_ops(q, k, v, mx.exp(log_g), beta, state)


def relative(found, expected):
    return float(mx.linalg.norm((found - expected).flatten()) / mx.linalg.norm(expected.flatten()))


def gradients(function, given):
    """Gradients of a weighted sum of the outputs and the last state."""
    y, state = (mx.random.normal(array.shape, key=mx.random.key(9)) for array in loop(*given))

    def loss(*given):
        found = function(*given)
        return (found[0] * y).sum() + (found[1] * state).sum()

    return mx.grad(loss, argnums=range(6))(*given)


@pytest.mark.parametrize("tokens", [1, 2, 7, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_values_and_gradients_are_those_of_the_loop(tokens):
    given = draw(tokens)
    for found, expected in zip(gated_delta(*given), loop(*given), strict=True):
        assert relative(found, expected) < 1e-5
    for found, expected in zip(gradients(gated_delta, given), gradients(loop, given), strict=True):
        assert relative(found, expected) < 1e-5


def test_keys_that_are_all_alike_lose_no_digits():
    """Then each token takes back nearly all that the one before has written."""
    q, k, v, log_g, _, state = draw(2 * CHUNK)
    alike = mx.broadcast_to(k[:, :1], k.shape)
    given = (q, alike, v, 1e-3 * log_g, mx.full(log_g.shape, 0.99), state)
    for found, expected in zip(gradients(gated_delta, given), gradients(loop, given), strict=True):
        assert relative(found, expected) < 1e-4


def test_long_decays_lose_no_digits():
    """Tokens that decay by little after many that decayed by a lot."""
    q, k, v, log_g, beta, state = draw(CHUNK)
    log_g = mx.where(mx.arange(CHUNK)[:, None] < CHUNK - 8, -200.0, 1e-3 * log_g)
    given = (q, k, v, log_g, beta, state)
    assert relative(gated_delta(*given)[1], loop(*given)[1]) < 1e-6


def test_tokens_without_decay_and_rate_leave_the_state():
    q, k, v, log_g, beta, state = draw(CHUNK + 3)
    real = (mx.arange(CHUNK + 3) < CHUNK - 4)[None, :, None]
    _, found = gated_delta(q, k, v, mx.where(real, log_g, 0), mx.where(real, beta, 0), state)
    cut = [array[:, : CHUNK - 4] for array in (q, k, v, log_g, beta)]
    assert relative(found, loop(*cut, state)[1]) < 1e-5


def test_the_inverse():
    lower = mx.tril(mx.random.normal((3, CHUNK, CHUNK), key=mx.random.key(0)), k=-1) / 3
    assert float(mx.abs(_inverse(lower) @ (mx.eye(CHUNK) + lower) - mx.eye(CHUNK)).max()) < 1e-4


def test_memory_grows_with_tokens_and_stays_far_below_the_loop():
    def peak(function, tokens):
        given = draw(tokens, rows=1, key_heads=4, heads=8, key_size=64, size=64)
        mx.eval(given)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradients(function, given))
        return mx.get_peak_memory() - held

    short, long = (peak(gated_delta, n * CHUNK) for n in (4, 12))
    assert long < 3.5 * short
    assert short < peak(loop, 4 * CHUNK) / 4


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    given = draw(CHUNK + 1)
    half = [array.astype(dtype) for array in given[:-1]]
    expected = loop(*(array.astype(mx.float32) for array in half), given[-1])
    for found, wanted in zip(gated_delta(*half, given[-1]), expected, strict=True):
        assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_where_a_gradient_is_wanted_no_kernel_without_one_is_taken(
    tmp_path, monkeypatch, recompute
):
    """As on Metal, where mlx-lm's kernel has no gradient and is not taken in training."""
    policy = tiny.make_tiny_policy(tmp_path / "model", **tiny.FAMILIES["qwen3_5"])
    family = sys.modules[type(policy.model.model).__module__]
    rule, asked = family.gated_delta_update, []

    def watched(*args, use_kernel, **options):
        asked.append(use_kernel)
        return rule(*args, use_kernel=use_kernel, **options)

    monkeypatch.setattr(family, "gated_delta_update", watched)
    assert policy.engine.check_recompute().accepted
    assert asked
    updater = Updater(policy, LearningConfig(lr=0.0), 1.0)
    updater.gradient.shared = True
    batch = selection(OBJECTIVES["clipped"], [scored(flat_group(4), [1, 0, 0, 1])]).batch
    updater.gradient(batch, replace(plan(4), grad_checkpoint=recompute))
    assert not any(asked)
    policy.engine.prefill(np.array([[5, 6, 7]]), [3])
    assert all(asked[-3:])
