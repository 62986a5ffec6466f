"""The emulation of Metal's rounding that other tests rest on (tests/emulation.py)."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import metal

from localrl.backend import mx, nn

KINDS = [mx.bfloat16, mx.float16]


def draw(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_exact_and_then_rounded(kind):
    x, w = draw(3, 64).astype(kind), draw(64, 8, seed=1).astype(kind)
    exact = mx.array(numbers(x) @ numbers(w))
    with metal():
        found, added = x @ w, mx.addmm(mx.ones((8,), kind), x, w)
    assert found.dtype == added.dtype == kind
    np.testing.assert_array_equal(numbers(found), numbers(exact.astype(kind)))
    np.testing.assert_array_equal(numbers(added), numbers((exact + 1).astype(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_rounded_from_some_number_of_rows_on(kind):
    layer = nn.QuantizedLinear(64, 32, bias=False, group_size=32)
    layer.set_dtype(kind)
    x = draw(9, 64).astype(kind)
    weight = mx.dequantize(
        layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), 32, 4
    )
    exact = mx.array(numbers(x) @ numbers(weight).T).astype(kind)
    rounded = mx.array(numbers(x) @ numbers(weight.astype(kind)).T).astype(kind)
    with metal(limit=6):
        few, many = layer(x[:5]), layer(x)
    # Summation orders differ: a sum at the border of two numbers may be rounded either way.
    assert (numbers(few) == numbers(exact)[:5]).mean() > 0.98
    assert (numbers(many) == numbers(rounded)).mean() > 0.98
    assert (numbers(rounded) == numbers(exact)).mean() < 0.95


def test_float32_loses_its_last_bits_on_an_m5_alone():
    x, w = draw(2, 64), draw(64, 8, seed=1)
    exact = numbers(x) @ numbers(w)
    with metal():
        np.testing.assert_allclose(numbers(x @ w), exact, rtol=1e-5, atol=1e-5)
    with metal(tf32=True):
        both, one = numbers(x @ w), numbers(x[:1] @ w)
    np.testing.assert_allclose(one, exact[:1], rtol=1e-5, atol=1e-5)
    error = np.abs(both - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 1e-3


def test_gradients_pass_and_everything_is_put_back():
    layer = nn.QuantizedLinear(64, 32, group_size=32)
    layer.set_dtype(mx.bfloat16)
    x = draw(9, 64).astype(mx.bfloat16)
    product, times = mx.quantized_matmul, mx.array.__matmul__
    expected = mx.grad(lambda x: layer(x).astype(mx.float32).sum())(x)
    with metal():
        found = mx.grad(lambda x: layer(x).astype(mx.float32).sum())(x)
    assert found.dtype == mx.bfloat16
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=0.05, atol=0.05)
    assert mx.quantized_matmul is product
    assert mx.array.__matmul__ is times
