from __future__ import annotations

import math

import numpy as np
import pytest

from localrl.backend import mx
from localrl.learning.objective import clipped_objective


def sums(new, old, coefficients):
    arrays = (mx.array(np.array(values, np.float32)) for values in (new, old, coefficients))
    return clipped_objective(*arrays, clip_low=0.2, clip_high=0.28)


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
        return clipped_objective(new, old, coefficients, clip_low=0.2, clip_high=0.28).loss

    np.testing.assert_allclose(np.array(mx.grad(loss)(old)), [-0.7, 0.3, 0.0], atol=1e-7)


def test_beyond_the_hold_there_is_no_gradient():
    def loss(new):
        old, coefficients = mx.array([0.0, 0.0]), mx.array([1.0, -1.0])
        return clipped_objective(new, old, coefficients, clip_low=0.2, clip_high=0.28).loss

    gradient = mx.grad(loss)(mx.array([math.log(1.4), math.log(0.7)]))
    assert gradient.tolist() == [0.0, 0.0]
