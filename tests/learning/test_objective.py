from __future__ import annotations

import math

import numpy as np
import pytest

from localrl.backend import mx
from localrl.learning.objective import policy_sums
from localrl.learning.objectives import OBJECTIVES


def sums(new, old, coefficients, objective="clipped", rows=None):
    arrays = [mx.array(values) for values in (new, old, coefficients)]
    rows = np.arange(len(coefficients)) if rows is None else np.array(rows)
    return policy_sums(OBJECTIVES[objective], *arrays, rows)


def test_worked_by_hand():
    # Ratios 1.5 and 0.5, held at 1.28 and 0.8, each with both signs; the lesser of the two counts.
    new = [math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)]
    result = sums(new, [0.0] * 4, [1.0, -1.0, 1.0, -1.0])
    assert result.loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8), rel=1e-6)
    assert result.clipped_high.item() == 1  # only where the hold bites: 1.5 with a positive sign
    assert result.clipped_low.item() == 1
    assert result.gap.item() == pytest.approx(2 * math.log(1.5) + 2 * math.log(2), rel=1e-6)
    assert result.gap_max.item() == pytest.approx(math.log(2), rel=1e-6)


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
