from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from forests import flat_group, forest, scored

from localrl.learning.credit import assign_credit, token_coefficients, with_expected_reward
from localrl.records import ScoredGroup


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
    credit = assign_credit(scored(flat_group(2), [1, 0], expected=0.5), kappa=4)
    # b = (other + 4 * 0.5) / 5
    assert credit.advantages == pytest.approx([1 - 2 / 5, 0 - 3 / 5])


def test_a_root_of_an_earlier_step_is_compared_with_what_was_expected_then():
    pair = with_expected_reward(flat_group(2), 0.9)
    earlier = replace(pair.nodes[0], old_logprobs=pair.nodes[0].sampled_logprobs)
    group = with_expected_reward(replace(pair, nodes=(earlier, pair.nodes[1])), 0.5)
    credit = assign_credit(ScoredGroup(group, (1, 0), {}), kappa=4)
    # b = (other + 4 * 0.9) / 5 for the earlier one, (other + 4 * 0.5) / 5 for the new one.
    assert credit.advantages == pytest.approx([1 - 3.6 / 5, 0 - 3 / 5])


def test_a_root_of_which_nothing_was_expected_is_compared_with_its_siblings():
    # Roots a, b; a forks into c and d. Nothing was known when a was drawn, 0.5 when b was.
    plain = forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2)
    expected = [None, 0.5, None, None]
    nodes = [replace(n, expected_reward=e) for n, e in zip(plain.nodes, expected, strict=True)]
    group = replace(plain, nodes=tuple(nodes))
    credit = assign_credit(ScoredGroup(group, (0, 1, 0), {}), kappa=4)
    # V(a) = 1/2; below a kappa is 0, so c and d are compared with each other alone.
    assert credit.advantages == pytest.approx([1 / 2, -(1 / 2 + 4 * 0.5) / 5, 1, -1])


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


def rounds(group, numbers):
    """The group, its nodes of these rounds."""
    pairs = zip(group.nodes, numbers, strict=True)
    return replace(group, nodes=tuple(replace(node, round=number) for node, number in pairs))


def test_later_roots_are_no_siblings_of_earlier_ones():
    group = rounds(flat_group(4), [0, 0, 1, 1])
    credit = assign_credit(scored(group, [0, 0, 1, 0]))
    # Baselines: of the first round each other's 0; of the second the mean of all three others.
    assert credit.advantages == pytest.approx([0, 0, 1, -1 / 3])
    assert credit.weights == pytest.approx([1 / 4] * 4)
    credit = assign_credit(scored(group, [0, 0, 1, 0], expected=0.5), kappa=4)
    # (0 + 4/2) / 5 for the first, (0 + 4/2) / 7 and (1 + 4/2) / 7 for the second.
    assert credit.advantages == pytest.approx([-2 / 5, -2 / 5, 1 - 2 / 7, -3 / 7])


def test_a_tree_of_a_later_round_has_the_earlier_root_as_its_sibling():
    # Root a in round 0; in round 1 root b, which forks into c and d.
    group = rounds(forest([-1, -1, 1, 1], leaves=[0, 2, 3], planned_roots=2), [0, 1, 1, 1])
    credit = assign_credit(scored(group, [1, 1, 0], expected=0.25), kappa=1)
    # b(a) = 1/4; V(b) = 1/2, b(b) = (1 + 1/4) / 2 = 5/8; b(c) = (0 + 5/8) / 2, b(d) = 13/16.
    assert credit.advantages == pytest.approx([3 / 4, -1 / 8, 11 / 16, -13 / 16])
    assert credit.weights == pytest.approx([1 / 2, 1 / 2, 1 / 4, 1 / 4])


def test_roots_that_did_not_come_keep_their_share():
    planned = replace(flat_group(2), planned_roots=8)
    assert assign_credit(scored(planned, [1, 0])).weights == pytest.approx([1 / 8] * 2)
    # A missing reward's share goes to those of its siblings that came.
    planned = replace(flat_group(4), planned_roots=8)
    credit = assign_credit(scored(planned, [1, None, 0, 0]))
    assert credit.weights == pytest.approx([1 / 6, 0, 1 / 6, 1 / 6])


@pytest.mark.parametrize("kappa", [0.0, 4.0])
def test_rounds_that_depend_on_rewards_stay_unbiased(kappa):
    """All outcomes of two rounds of two, the second only after equal rewards: Wald's identity."""
    p, total, roots = 0.3, 0.0, 0.0
    for rewards in product([0, 1], repeat=4):
        came = 4 if rewards[0] == rewards[1] else 2
        chance = np.prod([p if r else 1 - p for r in rewards])
        group = rounds(replace(flat_group(came), planned_roots=4), [0, 0, 1, 1][:came])
        credit = assign_credit(scored(group, rewards[:came], expected=0.8), kappa=kappa)
        scores = [1 / p if r else -1 / (1 - p) for r in rewards[:came]]
        total += chance * sum(credit.coefficient(n) * s for n, s in enumerate(scores))
        roots += chance * came
    # The gradient of p by itself is 1.
    assert total == pytest.approx(roots / 4)
