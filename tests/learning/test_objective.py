from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from localrl.backend import mx
from localrl.learning.objective import policy_sums
from localrl.learning.objectives import OBJECTIVES


def sums(new, first, coefficients, objective="clipped", rows=None, anchor=None):
    """The sums; without `anchor` the sampler computed what the first pass did."""
    anchor = first if anchor is None else anchor
    arrays = [mx.array(values) for values in (new, first, anchor, coefficients)]
    rows = np.arange(len(coefficients)) if rows is None else np.array(rows)
    return policy_sums(OBJECTIVES[objective], *arrays, rows)


def test_worked_by_hand():
    # Ratios 1.5 and 0.5, held at 1.28 and 0.8, each with both signs; the lesser of the two counts.
    new = [math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)]
    result = sums(new, [0.0] * 4, [1.0, -1.0, 1.0, -1.0])
    assert result.loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8), rel=1e-6)
    assert result.clipped_high.item() == 1  # only where the hold bites: 1.5 with a positive sign
    assert result.clipped_low.item() == 1
    assert result.gap.item() == result.gap_max.item() == result.truncated.item() == 0


def test_the_sampler_is_corrected_for_up_to_two():
    # The first pass finds 1.5, 0.5 and 2.5 times the sampler's probabilities.
    anchor = [-math.log(1.5), math.log(2), -math.log(2.5)]
    result = sums([math.log(1.4), 0.0, 0.0], [0.0] * 3, [1.0, -1.0, 1.0], anchor=anchor)
    # The ratio is that to the first pass: 1.4, cut to 1.28, and 1.
    assert result.loss.item() == pytest.approx(-(1.5 * 1.28 - 0.5 + 2.0), rel=1e-6)
    assert (result.clipped_high.item(), result.truncated.item()) == (1, 1)
    gaps = [math.log(1.5), math.log(2), math.log(2.5)]
    assert result.gap.item() == pytest.approx(sum(gaps), rel=1e-6)
    assert result.gap_max.item() == pytest.approx(max(gaps), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_the_first_update_the_gradient_is_the_corrected_coefficient(name):
    new = mx.array([-1.0, -2.0, -0.5, -3.0])
    anchor = [-1.04, -1.97, -0.51, -9.0]  # the last is cut to 2
    coefficients = [0.7, 0.3, -0.2, -0.4]

    def loss(logprobs):
        return sums(logprobs, new, coefficients, name, [0, 0, 1, 1], anchor).loss

    corrections = np.minimum(np.exp(np.array(new) - anchor), 2)
    expected = -corrections * coefficients
    if name == "gspo":  # one ratio for both tokens of a completion
        expected = np.repeat(expected.reshape(2, 2).mean(axis=1), 2)
    np.testing.assert_allclose(np.array(mx.grad(loss)(new)), expected, rtol=1e-5)


def test_a_ratio_on_the_edge_of_its_range_still_learns():
    edge = replace(OBJECTIVES["clipped"], clip_low=0.0, clip_high=0.0)
    logprobs, coefficients = mx.array([-1.0, -2.0]), mx.array([0.5, -0.25])

    def loss(new):
        return policy_sums(edge, new, logprobs, logprobs, coefficients, np.arange(2)).loss

    assert mx.grad(loss)(logprobs).tolist() == [-0.5, 0.25]


def test_at_ratio_one_the_gradient_is_reinforce():
    old = mx.array([-1.0, -2.0, -0.5])
    coefficients = mx.array([0.7, -0.3, 0.0])

    def loss(new):
        return sums(new, old, coefficients).loss

    np.testing.assert_allclose(np.array(mx.grad(loss)(old)), [-0.7, 0.3, 0.0], atol=1e-7)


def test_beyond_the_hold_there_is_no_gradient():
    def loss(new):
        old, coefficients = mx.array([0.0, 0.0]), mx.array([1.0, -1.0])
        return sums(new, old, coefficients).loss

    gradient = mx.grad(loss)(mx.array([math.log(1.4), math.log(0.7)]))
    assert gradient.tolist() == [0.0, 0.0]


def test_cispo_holds_the_weight_and_keeps_the_gradient():
    def loss(new):
        return sums(new, [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], "cispo").loss

    new = [math.log(8), math.log(8), math.log(0.1)]
    np.testing.assert_allclose(np.array(mx.grad(loss)(mx.array(new))), [-5, 5, -0.1], rtol=1e-6)
    result = sums(new, [0.0, 0.0, 0.0], [1.0, -1.0, 0.0], "cispo")
    assert (result.clipped_low.item(), result.clipped_high.item()) == (0, 2)


def test_rloo_forms_no_ratio():
    result = sums([-2.0, -3.0], [-9.0, -1.0], [0.5, -0.25], "rloo")
    assert result.loss.item() == pytest.approx(-(0.5 * -2 + 0.25 * 3))
    assert (result.clipped_low.item(), result.clipped_high.item()) == (0, 0)


def test_gspo_has_one_ratio_for_a_completion():
    # Completions of two tokens and of one: s = exp(mean log-ratio) = 1.0003 and 1.001.
    new = [math.log(2.0), math.log(1.0003**2 / 2), math.log(1.001)]
    result = sums(new, [0.0] * 3, [0.25, 0.25, 0.5], "gspo", rows=[0, 0, 1])
    assert result.loss.item() == pytest.approx(-(0.5 * 1.0003 + 0.5 * 1.0004), rel=1e-6)
    assert result.clipped_high.item() == 1
