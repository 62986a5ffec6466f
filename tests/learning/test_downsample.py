from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from localrl.learning.downsample import max_variance


def ascending(count: int) -> np.ndarray:
    return np.arange(count) / count


def test_hand_worked_binary():
    # k = 0, 1 and 2 all keep two of each value: the smallest leaves the zeros of the highest ties.
    weights = max_variance([0, 1, 0, 0, 1, 0], 4, ascending(6))
    assert weights.tolist() == [0, 1, 0, 2, 1, 2]


def test_a_rare_success_is_always_kept():
    # One of 1 one, 3 of 7 zeros.
    weights = max_variance([0, 0, 0, 0, 0, 1, 0, 0], 4, ascending(8))
    assert weights[5] == 1
    assert sorted(weights) == pytest.approx([0] * 4 + [1] + [7 / 3] * 3)


def test_hand_worked_real_rewards():
    # Kept: 0, 0.1 and 0.8, 1 (k = 2). The best cut lies between 0.4 and 0.7: 4 * 3 * apart^2 with
    # sides of means 0.2 and 2.5 / 3; sides of 4 and 3, of each 2 kept.
    rewards = [0.7, 0.0, 0.4, 1.0, 0.1, 0.8, 0.3]
    weights = max_variance(rewards, 4, ascending(7))
    assert weights.tolist() == [0, 2, 0, 3 / 2, 2, 3 / 2, 0]


def test_sides_need_not_be_of_one_size():
    # Kept: 0 and the two highest (k = 1); the cut sets 0 apart from the other three.
    assert max_variance([0.95, 0, 1, 0.9], 3, ascending(4)).tolist() == [3 / 2, 1, 3 / 2, 0]


def test_equal_rewards_are_kept_by_ties():
    ties = np.array([0.9, 0.1, 0.5, 0.3])
    assert max_variance([0.3] * 4, 3, ties).tolist() == [0, 4 / 3, 4 / 3, 4 / 3]


def test_one_kept_is_drawn_uniformly():
    assert max_variance([1, 0, 0, 0.5], 1, np.array([0.9, 0.1, 0.05, 0.3])).tolist() == [0, 0, 4, 0]


@pytest.mark.parametrize("keep", [0, 3, 4, 9])
def test_nothing_to_drop(keep):
    assert max_variance([1, None, 0, 0.5], keep, ascending(4)).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("rewards", [[], [None, None]])
def test_no_reward_at_all(rewards):
    assert max_variance(rewards, 2, ascending(len(rewards))).tolist() == [0] * len(rewards)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_missing_reward_does_not_count(keep):
    rewards, ties = [1, 0, 0.2, 1, 0], np.array([0.4, 0.1, 0.3, 0.2, 0.5])
    without = max_variance(rewards, keep, ties)
    with_missing = max_variance([None, *rewards, None], keep, np.array([0.0, *ties, 0.6]))
    assert with_missing.tolist() == [0, *without, 0]


def random_rewards(rng: np.random.Generator) -> np.ndarray:
    """Few or many values, of any scale, alike now and then."""
    size = int(rng.integers(1, 9))
    if rng.random() < 0.5:
        return rng.normal(size=size) * 10.0 ** rng.integers(-6, 7) + rng.normal()
    return rng.integers(0, rng.integers(1, 5), size) / 3


def test_no_other_subset_has_a_greater_variance():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rewards = random_rewards(rng)
        keep = int(rng.integers(2, 9))
        weights = max_variance(rewards.tolist(), keep, rng.random(len(rewards)))
        kept = min(keep, len(rewards))
        assert (weights > 0).sum() == kept
        greatest = max(np.var(subset) for subset in combinations(rewards, kept))
        assert np.var(rewards[weights > 0]) == pytest.approx(greatest, rel=1e-9)


def test_weights_of_a_side_sum_to_its_size():
    rng = np.random.default_rng(1)
    for _ in range(300):
        rewards = random_rewards(rng)
        keep = int(rng.integers(2, 9))
        weights = max_variance(rewards.tolist(), keep, rng.random(len(rewards)))
        high = high_side(rewards)
        for side in (high, ~high):
            assert weights[side].sum() == pytest.approx(side.sum())
            assert len(np.unique(weights[side & (weights > 0)])) <= 1


def high_side(rewards: np.ndarray) -> np.ndarray:
    """(n,) bool, by trying all cuts; nobody where all are equal."""
    best, greatest = np.zeros(len(rewards), bool), 0.0
    for value in np.unique(rewards)[1:]:
        high = rewards >= value
        means = np.where(high, rewards[high].mean(), rewards[~high].mean())
        if np.var(means) > greatest:
            best, greatest = high, np.var(means)
    return best


@pytest.mark.parametrize("keep", range(1, 7))
@pytest.mark.parametrize("successes", range(7))
def test_two_valued_rewards_are_unbiased(successes, keep):
    """Every completion's mean weight over all orders of the ties is 1: sums keep their means."""
    rewards = [1.0] * successes + [0.0] * (6 - successes)
    orders = [max_variance(rewards, keep, np.array(ties)) for ties in permutations(range(6))]
    assert np.mean(orders, axis=0) == pytest.approx([1] * 6)
    strata = [weights[:successes].sum() for weights in orders]
    if keep > 1:
        assert strata == pytest.approx([successes] * len(orders))


def test_more_values_are_biased_toward_extremes():
    orders = [max_variance([0.0, 0.4, 1.0], 2, np.array(t)) for t in permutations(range(3))]
    assert np.mean(orders, axis=0).tolist() == [2, 0, 1]


def test_a_permutation_of_completions_permutes_the_weights():
    rng = np.random.default_rng(2)
    for _ in range(100):
        rewards = random_rewards(rng)
        ties, order = rng.random(len(rewards)), rng.permutation(len(rewards))
        weights = max_variance(rewards.tolist(), 3, ties)
        permuted = max_variance(rewards[order].tolist(), 3, ties[order])
        assert permuted.tolist() == weights[order].tolist()
