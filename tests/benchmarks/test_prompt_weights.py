from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from localrl.learning.weighting import effective_weight

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from prompt_weights import (
    KNOWN,
    PAGE,
    PROBABILITIES,
    RULES,
    Rewards,
    balanced,
    expected_share,
    in_pairs,
    mixed,
    pairs,
    scores,
    table,
)

ROUNDING, NOISE = 0.05, 0.015
"""Of the known figures: one decimal, and two standard errors of 10^5 groups at the most."""


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("column", range(len(PROBABILITIES)))
def test_known_figures(name, column):
    weight = RULES[name].weight(PROBABILITIES[column])
    assert weight == pytest.approx(KNOWN[name][column], abs=ROUNDING + NOISE)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_rules_with_a_closed_form(p):
    assert RULES["none"].weight(p) == pytest.approx(1)
    assert RULES["mean"].weight(p) == pytest.approx(7 / 8)
    assert RULES["maxrl"].weight(p) == pytest.approx((1 - (1 - p) ** 7) / p)
    assert RULES["refill"].weight(p) == pytest.approx(1 / (1 - p**8 - (1 - p) ** 8))


@pytest.mark.parametrize("name", ["none", "mean", "std", "maxrl"])
def test_coefficients_do_what_the_package_says_of_its_weightings(name):
    for p in PROBABILITIES:
        assert RULES[name].weight(p) == pytest.approx(effective_weight(name, p, 8))


def test_hand_worked_share_of_rounds():
    # Mixed after 2 with chance 1/2; after that a round of 2 makes it mixed with chance 3/4.
    assert expected_share(0.5) == pytest.approx((2 / 2 + 4 * 3 / 8 + 6 * 3 / 32 + 8 / 32) / 8)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_rounds_give_the_share_that_came(p):
    assert RULES["rounds"].weight(p) == pytest.approx(expected_share(p))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_later_rounds_in_the_baseline_do_not(p):
    assert RULES["hindsight"].weight(p) > expected_share(p) + 0.01


def test_rounds_by_hand():
    for _, rewards in pairs(0.3):
        expected = []
        for i, reward in enumerate(rewards):
            others = [rewards[j] for j in range(i - i % 2 + 2) if j != i]
            expected.append((reward - np.mean(others)) / 8)
        assert in_pairs(rewards) == pytest.approx(np.array(expected))


def sample(rng: np.random.Generator, p: float, size: int, limit: int, enough) -> Rewards:
    rewards: Rewards = ()
    while len(rewards) < limit and not enough(rewards):
        rewards += tuple(int(reward) for reward in rng.random(size) < p)
    return rewards


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("pods", (16, 16, mixed)),
        ("rounds", (2, 8, mixed)),
        ("hindsight", (2, 8, mixed)),
        ("ada", (8, 32, balanced)),
    ],
)
def test_simulated_groups_agree_with_the_sums(name, plan):
    rng, p = np.random.default_rng(0), 0.25
    draws = [sample(rng, p, *plan) for _ in range(4000)]
    values = [np.dot(RULES[name].coefficients(rewards), scores(rewards, p)) for rewards in draws]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values) - RULES[name].weight(p)) < 3 * error
    if name == "hindsight":
        assert np.mean(values) - expected_share(p) > 3 * error


def test_the_page_has_these_figures():
    assert "\n".join(table()) in PAGE.read_text()
