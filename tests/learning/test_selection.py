from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from forests import flat_group, forest, node, scored

from localrl.learning.credit import Credit, assign_credit
from localrl.learning.objectives import OBJECTIVES, make_objective
from localrl.learning.selection import round_small, select
from localrl.records import Group, Leaf
from localrl.settings import LearningConfig

CLIPPED = OBJECTIVES["clipped"]


def selection(*groups, objective=CLIPPED, mask_truncated=False):
    credits = [assign_credit(group) for group in groups]
    return select(groups, credits, 40.0, objective, mask_truncated=mask_truncated)


def coefficients(chosen):
    return [node.coefficients.tolist() for node in chosen.batch.nodes]


def aged(group: Group, **differences) -> Group:
    """The group whose nodes n0, n1, ... have become likelier by these differences."""
    nodes = list(group.nodes)
    for name, difference in differences.items():
        n = int(name[1:])
        old = nodes[n].sampled_logprobs + np.array(difference, np.float32)
        nodes[n] = replace(nodes[n], old_logprobs=old)
    return replace(group, nodes=tuple(nodes))


def begun() -> Group:
    """Root 0 goes on as 1, a prefix and its tail; root 2 stands alone."""
    return forest([-1, 0, -1], leaves=[1, 2], planned_roots=2)


def test_groups_without_signal_are_dropped_but_still_counted_in_z():
    groups = [scored(flat_group(2), [1, 1]), scored(flat_group(2), [1, 0])]
    selection = select(groups, [assign_credit(group) for group in groups], 2 * 40.0, CLIPPED)
    assert selection.informative == (False, True)
    assert selection.kept == (False, True)
    assert selection.dropped == (("no coefficient",) * 2, (None, None))
    assert len(selection.batch.prompts) == 1
    assert selection.batch.z == 80.0


def test_no_signal_at_all_is_an_empty_batch():
    chosen = selection(scored(flat_group(2), [0, 0]))
    assert chosen.batch.nodes == ()
    assert chosen.trained_tokens == 0


def test_parents_point_into_the_joint_list():
    first = scored(flat_group(2), [1, 0])
    second = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    batch = selection(first, second).batch
    assert [node.parent for node in batch.nodes] == [-1, -1, -1, -1, 2, 2]
    assert [node.finish for node in batch.nodes] == [True, True, False, True, True, True]
    assert [node.prompt for node in batch.nodes] == [0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(batch.nodes[0].coefficients, [0.5] * 3)


def test_every_completion_has_its_reason():
    # Advantages 3/4, none, 0 and -3/4: of those with a reward, the others' means are 1/4, 1/2, 3/4.
    group = scored(flat_group(4), [1, None, 0.5, 0])
    reasons = (None, "no reward", "no coefficient", None)
    assert selection(group).dropped == (reasons,)
    chosen = selection(cut(group, 3), mask_truncated=True)
    assert chosen.dropped == ((None, "no reward", "no coefficient", "truncated"),)
    assert chosen.informative == chosen.kept == (True,)
    assert chosen.trained_tokens == 3


def cut(group, *leaves):
    """The group with these completions cut off for length."""
    ends = ("length" if i in leaves else "stop" for i in range(len(group.group.leaves)))
    pairs = zip(group.group.leaves, ends, strict=True)
    changed = tuple(replace(leaf, finish_reason=end) for leaf, end in pairs)
    return replace(group, group=replace(group.group, leaves=changed))


def test_truncated_completions_are_trained_unless_masked():
    group = cut(scored(flat_group(4), [1, 0, 0, 0]), 1, 3)
    assert selection(group).dropped == ((None,) * 4,)
    all_trained, chosen = coefficients(selection(group)), selection(group, mask_truncated=True)
    assert chosen.dropped == ((None, "truncated", None, "truncated"),)
    # Their rewards stay in the baselines.
    assert coefficients(chosen) == [all_trained[0], [0] * 3, all_trained[2], [0] * 3]
    assert chosen.batch.z == 40


def test_a_masked_completion_has_no_kl_either():
    group = cut(scored(flat_group(2), [1, 1]), 0)
    objective = make_objective(LearningConfig(kl_coef=1))
    chosen = selection(group, objective=objective, mask_truncated=True)
    assert [n.kl_weights.tolist() for n in chosen.batch.nodes] == [[0] * 3, [0.5] * 3]
    assert chosen.dropped == (("truncated", None),)


def test_tokens_that_a_finished_completion_shares_are_not_masked():
    # a forks into c and d. With d cut off, a is trained for c's sake; with both, nothing of it is.
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    some = selection(cut(tree, 2), mask_truncated=True)
    assert some.dropped == ((None, None, None),)
    assert [node.trained.any() for node in some.batch.nodes] == [True, True, True, False]
    both = selection(cut(tree, 1, 2), mask_truncated=True)
    assert both.dropped == ((None, "truncated", "truncated"),)
    assert [node.trained.any() for node in both.batch.nodes] == [False, True, False, False]
    missing = cut(scored(flat_group(2), [None, 1]), 0, 1)
    assert selection(missing, mask_truncated=True).dropped == (("no reward", "truncated"),)


def test_a_group_without_any_completion_left_is_dropped_whole():
    groups = scored(flat_group(2), [None, None]), cut(scored(flat_group(2), [1, 0]), 0, 1)
    chosen = selection(*groups, mask_truncated=True)
    assert chosen.dropped == (("no reward",) * 2, ("truncated",) * 2)
    assert chosen.kept == (False, False)
    assert None not in chosen.dropped[0]
    assert chosen.batch.prompts == chosen.batch.nodes == ()


def test_a_forks_shared_tokens_keep_both_completions():
    # c and d share a; a has an advantage of 1/2, they have 1/2 and -1/2: all are trained.
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    assert selection(tree).dropped == ((None, None, None),)
    # With a worth as much as b, only what tells c from d is left.
    chosen = selection(scored(tree.group, [0.5, 1, 0]))
    assert chosen.dropped == (("no coefficient", None, None),)
    assert chosen.trained_tokens == 6


def test_stale_tokens_are_anchored_at_the_present_policy_and_weighted():
    group = scored(aged(begun(), n0=[-0.1, -0.2, 0.1]), [1, 0])
    prefix, tail, other = selection(group).batch.nodes
    np.testing.assert_allclose(prefix.anchor_logprobs, [-1.1, -1.2, -0.9], rtol=1e-6)
    np.testing.assert_allclose(prefix.coefficients, 0.5 * np.exp([-0.1, -0.3, -0.2]), rtol=1e-6)
    # The tail is fresh, but its context was chosen by the earlier policy.
    np.testing.assert_allclose(tail.anchor_logprobs, [-1] * 3)
    np.testing.assert_allclose(tail.coefficients, [0.5 * np.exp(-0.2)] * 3, rtol=1e-6)
    np.testing.assert_allclose(other.coefficients, [-0.5] * 3)


def test_a_policy_that_has_not_moved_makes_nothing_stale():
    fresh = forest([-1, 0, -1], leaves=[1, 2], planned_roots=2)
    one, other = (
        selection(scored(fresh, [1, 0])),
        selection(scored(aged(fresh, n0=[0] * 3), [1, 0])),
    )
    assert coefficients(one) == coefficients(other)


SAID, LOOP = [10, 11, 12, 13, 14], [20, 21] * 24


def looping(cuts: list[int], reason="loop") -> Group:
    """A completion that ends in a loop, cut into a chain of nodes, and a short one."""
    pieces = np.split(np.array(SAID + LOOP), cuts)
    nodes = [node(n - 1, piece.tolist(), [True] * len(piece)) for n, piece in enumerate(pieces)]
    nodes.append(node(-1, [4, 5, 6], [True] * 3))
    leaves = Leaf(len(pieces) - 1, reason, ""), Leaf(len(pieces), "stop", "")
    return replace(flat_group(2), nodes=tuple(nodes), leaves=leaves)


@pytest.mark.parametrize("cuts", [[], [7], [9], [3, 20], [30]])
def test_a_loop_teaches_its_first_two_periods(cuts):
    objective = make_objective(LearningConfig(kl_coef=1))
    *chain, short = selection(scored(looping(cuts), [0, 1]), objective=objective).batch.nodes
    taught = len(SAID) + 4
    expected = [-0.5] * taught + [0] * (len(LOOP) - 4)
    assert np.concatenate([n.coefficients for n in chain]).tolist() == expected
    assert np.concatenate([n.kl_weights for n in chain]).tolist() == [-c for c in expected]
    assert short.coefficients.tolist() == [0.5] * 3


def test_a_completion_that_ended_otherwise_is_taught_whole():
    first, _ = selection(scored(looping([], reason="length"), [0, 1])).batch.nodes
    assert first.coefficients.tolist() == [-0.5] * 53


def test_trained_tokens_are_counted_once_and_without_foreign_ones():
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    mixed = scored(flat_group(2, sampled=[True, False, True]), [1, 0])
    assert selection(tree, mixed, scored(flat_group(5), [1] * 5)).trained_tokens == 4 * 3 + 2 * 2


def rounded(advantages, least, uniforms):
    credit = Credit(tuple(advantages), (1.0,) * len(advantages))
    return round_small(credit, least, np.array(uniforms)).advantages


def test_small_advantages_are_rounded_up_or_away():
    # 0.1 of 0.4 is a chance of 1/4.
    assert rounded([0.1, 0.1, -0.1, -0.1], 0.4, [0.2, 0.3, 0.2, 0.3]) == (0.4, 0, -0.4, 0)


def test_large_and_unknown_advantages_stay():
    found = rounded([0.4, -0.7, None, 0.0], 0.4, [0.99, 0.99, 0.01, 1e-9])
    assert found == (0.4, -0.7, None, 0.0)


@pytest.mark.parametrize("advantage", [k / 16 * 0.4 for k in range(-20, 21)])
def test_rounding_is_unbiased(advantage):
    grid = (np.arange(16) + 0.5) / 16
    found = rounded([advantage] * 16, 0.4, grid)
    assert np.mean(found) == pytest.approx(advantage, abs=1e-12)
    assert set(found) <= ({0.4, 0.0, -0.4} if abs(advantage) < 0.4 else {advantage})


def test_what_was_rounded_away_has_no_coefficient():
    group = scored(flat_group(2), [0.1, 0])
    credit = round_small(assign_credit(group), 0.2, np.array([0.4, 0.6]))
    chosen = select([group], [credit], 40.0, CLIPPED)
    assert chosen.dropped == ((None, "no coefficient"),)
    np.testing.assert_allclose(chosen.batch.nodes[0].coefficients, [0.1] * 3)
