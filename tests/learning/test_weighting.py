from __future__ import annotations

from statistics import fmean, stdev

import numpy as np
import pytest
from forests import flat_group, scored

from localrl.errors import ConfigError
from localrl.learning.credit import assign_credit
from localrl.learning.weighting import effective_weight, prompt_weight, weighting_names

PROBABILITIES = (0.02, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.98)
PRINTED = {
    "none": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "std": (2.4, 2.3, 2.2, 1.9, 1.7, 1.9, 2.2, 2.3, 2.4),
    "maxrl": (6.6, 6.0, 5.2, 3.5, 2.0, 1.3, 1.1, 1.1, 1.0),
}
"""w(p) of groups of 8, by simulation of the papers' own advantages."""

REWARDS = [0.9, 0.0, 0.25, 1.0]


def weighted_advantages(name: str, rewards: list[float]) -> list[float]:
    credit = assign_credit(scored(flat_group(len(rewards)), rewards))
    return [prompt_weight(name, rewards) * (a or 0.0) for a in credit.advantages]


@pytest.mark.parametrize(
    ("name", "divisor"),
    [("mean", 1), ("std", stdev(REWARDS) + 1e-4), ("maxrl", fmean(REWARDS))],
)
def test_weighted_credit_is_the_papers_advantage(name, divisor):
    expected = [(r - fmean(REWARDS)) / divisor for r in REWARDS]
    assert weighted_advantages(name, REWARDS) == pytest.approx(expected, rel=1e-12)


def test_hand_worked_factors():
    # Two of four: mean 1/2, variance 4 * (1/2)^2 / 3 = 1/3; each factor has (4 - 1) / 4 in it.
    half = [1.0, 1.0, 0.0, 0.0]
    assert prompt_weight("none", half) == 1
    assert prompt_weight("mean", half) == 3 / 4
    assert prompt_weight("std", half) == pytest.approx(3 / 4 / ((1 / 3) ** 0.5 + 1e-4))
    assert prompt_weight("maxrl", half) == pytest.approx(3 / 4 / (1 / 2))


@pytest.mark.parametrize("name", PRINTED)
@pytest.mark.parametrize("column", range(len(PROBABILITIES)))
def test_effective_weights_are_those_of_the_simulation(name, column):
    exact = effective_weight(name, PROBABILITIES[column], group_size=8)
    assert round(exact, 1) == PRINTED[name][column]


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_effective_weights_with_a_closed_form(p):
    assert effective_weight("none", p, 8) == pytest.approx(1)
    assert effective_weight("mean", p, 8) == pytest.approx(7 / 8)
    assert effective_weight("maxrl", p, 8) == pytest.approx((1 - (1 - p) ** 7) / p)


@pytest.mark.parametrize("name", ["none", "mean", "std", "maxrl"])
def test_effective_weight_is_what_the_coefficients_do(name):
    """Enumerates the rewards of a group of 4 whose success probability is its one parameter."""
    p, size = 0.3, 4
    total = 0.0
    for code in range(2**size):
        rewards = [float(code >> i & 1) for i in range(size)]
        chance = np.prod([p if r else 1 - p for r in rewards])
        scores = [1 / p if r else -1 / (1 - p) for r in rewards]
        total += chance * np.dot(weighted_advantages(name, rewards), scores) / size
    assert effective_weight(name, p, size) == pytest.approx(total)


@pytest.mark.parametrize("rewards", [[0.0] * 8, [1.0] * 8, [0.3] * 3, [-2.0, -2.0], [0.7], []])
@pytest.mark.parametrize("name", ["none", "mean", "std", "maxrl"])
def test_groups_all_alike_have_finite_weights(name, rewards):
    assert np.isfinite(prompt_weight(name, rewards))


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [1.0, 1.0], [0.7]])
def test_the_deviation_of_equal_rewards_blows_nothing_up(rewards):
    assert prompt_weight("std", rewards) == 0


def test_a_group_in_which_nothing_succeeds_teaches_nothing_under_maxrl():
    assert prompt_weight("maxrl", [0.0, 0.0]) == 0
    assert prompt_weight("maxrl", [-1.0, 0.0]) == 0


def test_names():
    assert weighting_names() == ("none", "mean", "std", "maxrl")
    with pytest.raises(ConfigError, match="Did you mean 'maxrl'"):
        prompt_weight("max_rl", [1.0, 0.0])


@pytest.mark.parametrize(("p", "size"), [(-0.1, 8), (1.1, 8), (0.5, 1)])
def test_arguments_out_of_range(p, size):
    with pytest.raises(ValueError, match="must be"):
        effective_weight("std", p, size)
