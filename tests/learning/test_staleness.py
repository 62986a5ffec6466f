"""What tokens of an earlier policy count for, with numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from forests import flat_group, forest

from localrl.learning.staleness import (
    TRUNCATION,
    anchor_logprobs,
    importance,
    with_scored_logprobs,
)
from localrl.records import Group


def stale(group: Group, differences: Mapping[int, Sequence[float]]) -> Group:
    """The group whose nodes have become likelier by these differences; all others are fresh."""
    nodes = list(group.nodes)
    for n, difference in differences.items():
        old = nodes[n].sampled_logprobs + np.array(difference)
        nodes[n] = replace(nodes[n], old_logprobs=old)
    return replace(group, nodes=tuple(nodes))


def test_fresh_tokens_weigh_exactly_one():
    for weights in importance(forest([-1, -1, 0, 0], [1, 2, 3], 2)):
        assert weights.dtype == np.float64
        assert weights.tolist() == [1, 1, 1]
    same = stale(flat_group(2), {0: [0, 0, 0], 1: [0, 0, 0]})
    assert [w.tolist() for w in importance(same)] == [[1, 1, 1]] * 2


def test_weights_accumulate_along_the_path():
    # Roots 0 and 1; the fresh tail 2 and the stale 3 go on from 0.
    group = stale(forest([-1, -1, 0, 0], [1, 2, 3], 2), {0: [0.1, -0.3, 0.2], 3: [0.5, -1, 0]})
    root, other, tail, child = importance(group)
    np.testing.assert_allclose(root, np.exp([0.1, -0.2, 0.0]), rtol=1e-6)
    assert other.tolist() == [1, 1, 1]
    np.testing.assert_allclose(tail, np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(child, np.exp([0.5, -0.5, -0.5]), rtol=1e-6)


def test_a_fresh_tail_weighs_what_its_prefix_does():
    group = stale(forest([-1, 0], [1], 1), {0: [-0.2, -0.2, -0.1]})
    prefix, tail = importance(group)
    np.testing.assert_allclose(prefix, np.exp([-0.2, -0.4, -0.5]), rtol=1e-6)
    assert tail.tolist() == [prefix[-1]] * 3


def test_the_sum_is_truncated_only_where_it_is_used():
    # log 2 = 0.693: the first is cut to 2, and the second is exp(1 - 0.5), not 2 exp(-0.5).
    (weights,) = importance(stale(flat_group(1), {0: [1.0, -0.5, 3.0]}))
    np.testing.assert_allclose(weights, [TRUNCATION, np.exp(0.5), TRUNCATION], rtol=1e-6)


def test_tokens_that_were_not_sampled_do_not_count():
    group = stale(flat_group(1, (True, False, True)), {0: [0.2, 7.0, 0.2]})
    np.testing.assert_allclose(importance(group)[0], np.exp([0.2, 0.2, 0.4]), rtol=1e-6)


@pytest.mark.parametrize("huge", [1e6, -1e6, np.inf, -np.inf])
def test_huge_ratios_stay_finite(huge):
    group = stale(flat_group(1), {0: [huge, 0.0, 0.0]})
    (weights,) = importance(group)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights, TRUNCATION if huge > 0 else np.exp(-20.0))


def test_an_empty_node_passes_the_sum_on():
    group = forest([-1, 0, 1], [2], 1)
    hollow = group.nodes[1]
    fields = ("token_ids", "sampled", "sampled_logprobs", "entropies")
    hollow = replace(hollow, **{name: getattr(hollow, name)[:0] for name in fields})
    group = replace(group, nodes=(group.nodes[0], hollow, group.nodes[2]))
    _, empty, last = importance(stale(group, {0: [0.1, 0.1, 0.1]}))
    assert empty.tolist() == []
    np.testing.assert_allclose(last, np.exp(0.3) * np.ones(3), rtol=1e-6)


def rounded(group: Group, n: int, difference: float) -> Group:
    """The group whose sampler overstated one node's log-probabilities by this."""
    nodes = list(group.nodes)
    nodes[n] = replace(nodes[n], scored_logprobs=nodes[n].sampled_logprobs - np.float32(difference))
    return replace(group, nodes=tuple(nodes))


def test_the_sampler_s_rounding_is_no_staleness():
    # A pass of the sampler's policy finds 0.3 less than it wrote; that of now nearly the same.
    group = rounded(stale(flat_group(2), {0: [-0.3, -0.3, -0.2]}), 0, 0.3)
    assert importance(group)[0].tolist() == [1, 1, 1]
    # It is left to the correction of the update's first pass, here `old`, as a fresh token's is.
    node = group.nodes[0]
    assert node.old_logprobs is not None
    correction = node.old_logprobs - anchor_logprobs(node)
    np.testing.assert_allclose(correction, [-0.3] * 3, rtol=1e-5)


def test_movement_is_shrunk_by_what_rounding_explains():
    # Mean squares: 0.12 of the differences between two passes, 0.03 of rounding.
    moved = np.array([0.6, 0.0, 0.0])
    rounding = np.array([0.3, 0.0, 0.0], np.float32)
    group = stale(flat_group(2), {0: moved})
    scored = group.nodes[0].sampled_logprobs + rounding
    old = scored + np.float32(moved)
    first = replace(group.nodes[0], scored_logprobs=scored, old_logprobs=old)
    group = replace(group, nodes=(first, group.nodes[1]))
    np.testing.assert_allclose(np.log(importance(group)[0]), [0.45] * 3, rtol=1e-5)
    # Tokens without a score are as they were.
    both = stale(group, {1: [0.1, 0.0, 0.0]})
    np.testing.assert_allclose(np.log(importance(both)[0]), [0.45] * 3, rtol=1e-5)
    np.testing.assert_allclose(np.log(importance(both)[1]), [0.1] * 3, rtol=1e-5)


def test_anchors():
    fresh = rounded(flat_group(1), 0, 0.3).nodes[0]
    assert anchor_logprobs(fresh) is fresh.sampled_logprobs
    old = stale(flat_group(1), {0: [0.1, 0.2, 0.3]}).nodes[0]
    assert anchor_logprobs(old) is old.old_logprobs


def test_only_what_was_just_sampled_is_scored():
    group = stale(forest([-1, 0], [1], 1), {0: [0.1, 0.1, 0.1]})
    scores = [np.full(3, -0.5, np.float32)] * 2
    prefix, tail = with_scored_logprobs(group, scores).nodes
    assert prefix.scored_logprobs is None
    assert prefix.written_logprobs is prefix.sampled_logprobs
    assert tail.scored_logprobs is tail.written_logprobs is scores[1]
