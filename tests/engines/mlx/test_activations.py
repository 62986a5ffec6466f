from __future__ import annotations

import numpy as np
import pytest

from localrl.backend import mx, nn
from localrl.engines.mlx.activations import exp, silu, swiglu, use_fast_swiglu

DRAWS = np.random.default_rng(0).normal(0, 5, 10_000).astype(np.float32)


def test_exp_is_exact_to_float32():
    exact = np.exp(DRAWS.astype(np.float64))
    np.testing.assert_allclose(np.array(exp(mx.array(DRAWS))), exact, rtol=3e-6)


def test_exp_holds_at_the_ends_and_keeps_nan():
    result = np.array(exp(mx.array([-1e30, 1e30, float("-inf"), float("nan"), 0.0])))
    assert result[0] == result[2] < 1e-37
    assert 1e37 < result[1] < np.inf
    assert np.isnan(result[3])
    assert result[4] == 1


def test_the_fast_gate_and_the_slow_one_agree():
    gate, x = mx.array(DRAWS), mx.array(DRAWS[::-1].copy())
    np.testing.assert_allclose(np.array(swiglu(gate, x)), np.array(nn.silu(gate) * x), atol=1e-4)

    def slow(gate, x):
        return (nn.silu(gate) * x * x).sum()

    def fast(gate, x):
        return (swiglu(gate, x) * x).sum()

    for a, b in zip(mx.grad(fast, (0, 1))(gate, x), mx.grad(slow, (0, 1))(gate, x), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


def test_the_derivative_at_zero():
    assert mx.grad(lambda x: silu(x).sum())(mx.array([0.0])).item() == pytest.approx(0.5)


def test_a_family_with_the_gate_takes_it(policy):
    assert use_fast_swiglu(policy.model)


def test_a_family_without_it_is_left_alone():
    assert not use_fast_swiglu(nn.Linear(2, 2))
