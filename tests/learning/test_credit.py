from __future__ import annotations

import numpy as np
import pytest
from forests import flat_group, forest, scored

from localrl.learning.credit import assign_credit, token_coefficients


def test_a_flat_group_is_leave_one_out():
    credit = assign_credit(scored(flat_group(4), [1, 0, 0, 1]))
    # The others' mean: of {0, 0, 1} for a 1, of {1, 0, 1} for a 0.
    assert credit.advantages == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert credit.weights == pytest.approx([1 / 4] * 4)


def test_equal_rewards_give_zero():
    credit = assign_credit(scored(flat_group(3), [0.3, 0.3, 0.3]))
    assert [credit.coefficient(n) for n in range(3)] == pytest.approx([0, 0, 0])


def test_a_leaf_without_reward_is_left_out_of_everything():
    credit = assign_credit(scored(flat_group(4), [1, None, 0, 0]))
    assert credit.advantages[1] is None
    assert credit.coefficient(1) == 0
    # As if the group had three: weights 1/3, the others' means 0, 1/2, 1/2.
    assert credit.weights == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert [credit.advantages[n] for n in (0, 2, 3)] == pytest.approx([1, -1 / 2, -1 / 2])


@pytest.mark.parametrize("rewards", [[None, None], [1, None]])
def test_nothing_to_compare_with_teaches_nothing(rewards):
    credit = assign_credit(scored(flat_group(2), rewards))
    assert [credit.coefficient(n) for n in range(2)] == [0, 0]


def test_kappa_shrinks_toward_the_prior():
    credit = assign_credit(scored(flat_group(2), [1, 0]), kappa=4, prior=0.5)
    # b = (other + 4 * 0.5) / 5
    assert credit.advantages == pytest.approx([1 - 2 / 5, 0 - 3 / 5])


def test_weights_divide_at_forks_and_values_nest():
    # Roots a, b; a forks into c, d; d forks into e, f.
    group = forest([-1, -1, 0, 0, 3, 3], leaves=[1, 2, 4, 5], planned_roots=2)
    credit = assign_credit(scored(group, [0, 1, 1, 0]))
    assert credit.weights == pytest.approx([1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8])
    # V: d = 1/2, a = (1 + 1/2) / 2 = 3/4, b = 0.
    assert credit.advantages == pytest.approx([3 / 4, -3 / 4, 1 / 2, -1 / 2, 1, -1])


def test_a_survivor_of_pruning_keeps_its_parents_baseline():
    # Roots a, b; a was to be pruned with probability 1/2 and survived as c.
    group = forest([-1, -1, 0], leaves=[1, 2], planned_roots=2, cond_weights=[1, 1, 2])
    credit = assign_credit(scored(group, [0, 0.5]))
    assert credit.weights == pytest.approx([1 / 2, 1 / 2, 1])
    # V: c = 1/2, a = 2 * 1/2; b(a) = b's value 0, and so is b(c).
    assert credit.advantages == pytest.approx([1, -1, 1 / 2])


@pytest.mark.parametrize("reward", [0, 1])
def test_a_survivor_below_a_lone_root_has_nothing_to_compare_with(reward):
    # The root's value is twice its survivor's: as a baseline it would punish a success.
    group = forest([-1, 0], leaves=[1], planned_roots=1, cond_weights=[1, 2])
    credit = assign_credit(scored(group, [reward]))
    assert credit.advantages == (0, 0)


def test_tokens_that_the_model_did_not_write_get_no_coefficient():
    group = flat_group(2, sampled=[True, False, True])
    coefficients = token_coefficients(group, assign_credit(scored(group, [1, 0])))
    np.testing.assert_allclose(coefficients[0], [0.5, 0, 0.5])
