from __future__ import annotations

import numpy as np
import pytest

from localrl.backend import mx, nn
from localrl.engines.mlx.logprobs import gather_logprobs, head_logprobs

POSITIONS, WIDTH, VOCABULARY = 96, 32, 8192


def quantised_head() -> nn.QuantizedLinear:
    mx.random.seed(0)
    return nn.QuantizedLinear.from_linear(nn.Linear(WIDTH, VOCABULARY, bias=False), 32, 4)


def dense_head() -> nn.Linear:
    mx.random.seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=True)


def tied_head():
    mx.random.seed(0)
    return nn.QuantizedEmbedding.from_embedding(nn.Embedding(VOCABULARY, WIDTH), 32, 4).as_linear


def inputs():
    draws = np.random.default_rng(0)
    states = mx.array(draws.normal(size=(POSITIONS, WIDTH)).astype(np.float32))
    targets = mx.array(draws.integers(0, VOCABULARY, POSITIONS).astype(np.int32))
    weights = mx.array(draws.normal(size=POSITIONS).astype(np.float32))
    return states, targets, weights


@pytest.mark.parametrize("make", [quantised_head, dense_head, tied_head])
@pytest.mark.parametrize("chunk", [7, 32, 1000])
def test_values_and_gradient_equal_whole_logits(make, chunk):
    head = make()
    states, targets, weights = inputs()

    def chunked(states):
        return (weights * head_logprobs(head, states, targets, 0.7, chunk)).sum()

    def whole(states):
        return (weights * gather_logprobs(head(states), targets, 0.7)).sum()

    value, gradient = mx.value_and_grad(chunked)(states)
    expected_value, expected = mx.value_and_grad(whole)(states)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    difference = mx.linalg.norm(gradient - expected) / mx.linalg.norm(expected)
    assert difference.item() < 1e-5


def peak(function, states) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.value_and_grad(function)(states))
    return mx.get_peak_memory() - before


def test_chunks_bound_the_memory_of_logits():
    head = quantised_head()
    states, targets, weights = inputs()
    mx.eval(states, targets, weights, head.parameters())
    logits = POSITIONS * VOCABULARY * 4

    def chunked(states):
        return (weights * head_logprobs(head, states, targets, 1.0, 8)).sum()

    def whole(states):
        return (weights * gather_logprobs(head(states), targets, 1.0)).sum()

    assert peak(whole, states) > 2 * logits
    assert peak(chunked, states) < logits
