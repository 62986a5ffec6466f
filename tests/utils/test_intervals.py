"""Intervals and tests against hand-worked numbers and against drawing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from localrl.utils.intervals import (
    FLIPS,
    mcnemar,
    mean_interval,
    paired_interval,
    pass_at_k,
    share_interval,
    sign_flip,
    wilson,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_choices_that_hold_one(n):
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations(range(n), k))
        share = sum(min(choice) < passed for choice in choices) / len(choices)
        assert pass_at_k(n, passed, k) == pytest.approx(share)


def test_mcnemar_is_two_tails_of_a_fair_coin():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 1) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(0, 2000) < 1e-300 or mcnemar(0, 2000) == 0.0


def test_the_paired_interval_by_hand():
    # n = 100, only the first 5, only the second 15: d = 10 / 102, 21 - 100 / 102 = 20.0196.
    error = 1.959964 * math.sqrt(20.019608) / 102
    low, high = paired_interval(5, 15, 100)
    assert (low, high) == pytest.approx((10 / 102 - error, 10 / 102 + error))
    assert paired_interval(0, 0, 10)[0] < 0 < paired_interval(0, 0, 10)[1]


def test_single_completions_have_the_wilson_interval():
    assert share_interval([1.0] * 30 + [0.0] * 70, 1) == pytest.approx(wilson(30, 100), abs=1e-3)
    assert share_interval([1.0] * 20, 1) == wilson(20, 20)


def test_the_interval_lies_between_that_of_prompts_and_of_completions():
    # All prompts alike: as sure as 8 * 50 completions. Each all or nothing: as sure as 50.
    assert share_interval([0.5] * 50, 8) == pytest.approx(wilson(25, 50))
    nearly = [0.5, 0.4999] * 25
    assert share_interval(nearly, 8) == pytest.approx(wilson(200, 400), abs=1e-3)
    assert share_interval([0.0, 1.0] * 25, 8) == pytest.approx(wilson(25, 50), abs=1e-3)


@pytest.mark.parametrize(("a", "b", "k"), [(0.2, 0.2, 1), (0.5, 5, 4), (5, 0.2, 8)])
def test_the_interval_holds_the_truth_as_often_as_it_says(a, b, k):
    draws = np.random.default_rng(0)
    truth = np.mean(1 - (1 - draws.beta(a, b, 200_000)) ** k)
    held = 0
    for _ in range(400):
        passed = draws.binomial(8, draws.beta(a, b, 64))
        low, high = share_interval([pass_at_k(8, int(n), k) for n in passed], 8)
        held += low <= truth <= high
    # 95 % of 400 are 380; 365 is 3.4 standard deviations below.
    assert held >= 365


def test_sign_flips_agree_with_all_of_them():
    differences = [0.5, 0.25, 0.0, -0.25, 0.75, 0.5, 0.25, 0.5]
    signs = itertools.product([-1, 1], repeat=8)
    sums = [abs(np.dot(s, differences)) for s in signs]
    exact = np.mean([s >= sum(differences) - 1e-9 for s in sums])
    assert sign_flip(differences, 0) == pytest.approx(exact, abs=0.01)
    assert sign_flip([0.0] * 9, 0) == 1.0
    assert sign_flip([1.0] * 60, 0) == 1 / (FLIPS + 1)


def test_the_mean_interval():
    assert mean_interval([0.5]) is None
    low, high = mean_interval([0.0, 0.5, 1.0, 0.5])
    error = 1.959964 * math.sqrt(1 / 6) / 2
    assert (low, high) == pytest.approx((0.5 - error, 0.5 + error))
