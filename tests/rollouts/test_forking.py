"""Decoding that forks: exact against a full forward, within its budget, and blind to the future."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
from exact import assert_exact
from forests import forest

from localrl.errors import ConfigError
from localrl.learning.credit import assign_credit
from localrl.records import Example, ScoredGroup
from localrl.rollouts.decode import Decoder, LiveView
from localrl.rollouts.forking import (
    EntropyRule,
    PeriodicRule,
    Spacing,
    forks_per_path,
    within_budget,
)
from localrl.rollouts.groups import Shape, sample_groups

TEXTS = ("12", "sum 1 2 3 and more of it", "a", "zebra 99")


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, *tiny.UNPLANNED])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    changes = {**tiny.FAMILIES, **tiny.UNPLANNED}[request.param]
    return tiny.make_tiny_policy(folder, **changes)


@dataclass
class Always:
    """Fork whenever a path has this many tokens and leaves are left."""

    at: tuple[int, ...]

    def choose(self, view: LiveView) -> np.ndarray:
        return within_budget(np.isin(view.lengths, self.at) & view.alive, view.entropies, view)


def sample(policy, rule, *, rows=64, roots=2, leaves=8, tokens=24, temperature=1.0, **more):
    examples = [Example(id=text, messages=({"role": "user", "content": text},)) for text in TEXTS]
    decoder = Decoder(policy, temperature, rows)
    return sample_groups(
        decoder,
        examples,
        [policy.tokenizer.encode(example.messages) for example in examples],
        Shape(roots, leaves),
        max_completion_tokens=tokens,
        seed=0,
        step=1,
        version=0,
        rule=rule,
        **more,
    )


def test_decoding_after_a_fork_equals_a_full_forward(family):
    groups = sample(family, Always((3, 7, 15)), temperature=0.8)
    assert max(len(group.path(leaf.node)) for group in groups for leaf in group.leaves) >= 3
    assert_exact(family, groups, temperature=0.8)


@pytest.mark.parametrize("at", [(0,), (0, 1, 2), tuple(range(24))])
def test_forks_at_the_prompts_end_and_everywhere(policy, at):
    groups = sample(policy, Always(at))
    assert any(len(node.token_ids) == 0 for group in groups for node in group.nodes)
    assert_exact(policy, groups)


def test_a_finished_path_does_not_fork(policy):
    groups = sample(policy, Always(tuple(range(24))), leaves=16)
    for group in groups:
        forked = {node.parent for node in group.nodes}
        for leaf in group.leaves:
            assert leaf.node not in forked
            assert leaf.finish_reason in ("stop", "length")


def test_children_of_a_fork_are_drawn_independently(policy):
    groups = sample(policy, Always((0,)))
    firsts = [
        tuple(int(n.token_ids[0]) for n in group.nodes if n.parent == parent)
        for group in groups
        for parent in {node.parent for node in group.nodes} - {-1}
    ]
    assert all(len(pair) == 2 for pair in firsts)
    assert len({pair[0] != pair[1] for pair in firsts}) == 2  # some differ, some do not


@pytest.mark.parametrize("leaves", [2, 3, 5, 8])
def test_a_tree_never_has_more_leaves_than_allowed(policy, leaves):
    groups = sample(policy, Always((2, 4, 6, 8)), leaves=leaves)
    assert max(len(group.leaves) for group in groups) == leaves
    for group in groups:
        assert len(group.leaves) <= leaves
        credit = assign_credit(ScoredGroup(group, (1.0,) * len(group.leaves), {}))
        assert sum(credit.weights[leaf.node] for leaf in group.leaves) == pytest.approx(1.0)


@pytest.mark.exact
@pytest.mark.parametrize("rows", [8, 9, 13, 20])
def test_rows_are_never_exceeded_and_change_nothing(policy, rows):
    seen = []

    def watched(tokens, cache=None):
        seen.append(tokens.shape[0])
        return policy.engine.network.hidden(tokens, cache=cache)

    from dataclasses import replace

    whole = sample(policy, Always((3, 6, 9)))
    engine = replace(policy.engine, network=replace(policy.engine.network, hidden=watched))
    parts = sample(replace(policy, engine=engine), Always((3, 6, 9)), rows=rows)
    assert 0 < max(seen) <= rows
    for one, other in zip(whole, parts, strict=True):
        assert len(one.nodes) == len(other.nodes)
        for a, b in zip(one.nodes, other.nodes, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)


def test_a_tree_that_cannot_fit_is_refused(policy):
    with pytest.raises(ConfigError, match=r"may have 8 leaves, but only 7 rows"):
        sample(policy, Always((3,)), rows=7)


@pytest.mark.exact
def test_a_tree_without_forks_is_a_flat_group_to_the_last_bit(policy):
    flat = sample(policy, None, roots=4, leaves=4)
    tree = sample(policy, Always(()), roots=4, leaves=9)
    for one, other in zip(flat, tree, strict=True):
        assert one.planned_roots == other.planned_roots
        assert [leaf.text for leaf in one.leaves] == [leaf.text for leaf in other.leaves]
        for a, b in zip(one.nodes, other.nodes, strict=True):
            assert (a.parent, a.cond_weight) == (b.parent, b.cond_weight)
            for field in ("token_ids", "sampled_logprobs", "entropies"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def view(**changes):
    columns = {
        "trees": [0, 0, 0, 1],
        "entropies": [0.1, 2.0, 1.0, 3.0],
        "lengths": [20, 20, 20, 20],
        "since_fork": [20, 20, 20, 20],
        "forks": [0, 0, 0, 0],
        "leaves_left": [2, 2, 2, 1],
        "coins": [0.1, 0.9, 0.2, 0.3],
        "alive": [True, True, True, True],
        "expected": [np.nan] * 4,
    }
    return LiveView(**{name: np.array(values) for name, values in (columns | changes).items()})


def spacing(**changes):
    return Spacing(**({"roots": 2, "leaves": 8, "expected_length": 40.0} | changes))


def test_entropy_forks_above_its_threshold():
    rule = EntropyRule(spacing(), threshold=0.5)
    assert rule.choose(view()).tolist() == [False, True, True, True]


def test_the_most_uncertain_come_first_within_the_budget():
    rule = EntropyRule(spacing(), threshold=0.0)
    left = [1, 1, 1, 0]
    assert rule.choose(view(leaves_left=left)).tolist() == [False, True, False, False]


def test_periodic_tosses_coins_and_ignores_entropy():
    chosen = PeriodicRule(spacing()).choose(view())
    assert chosen.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, True),
        ({"lengths": [3] * 4}, False),  # too early
        ({"since_fork": [7] * 4, "forks": [1] * 4}, False),  # too soon after a fork
        ({"since_fork": [8] * 4, "forks": [1] * 4}, True),
        ({"lengths": [9] * 4, "forks": [1] * 4}, False),  # the second fork is not unlocked yet
        ({"forks": [3] * 4}, False),  # half of the length, half of the forks
        ({"lengths": [400] * 4, "forks": [3] * 4}, False),  # the most there may be
        ({"alive": [False] * 4}, False),
    ],
)
def test_spacing(changes, allowed):
    assert set(spacing().open(view(**changes)).tolist()) == {allowed}


def test_the_gap_follows_the_expected_length():
    assert (
        not spacing(expected_length=100.0)
        .open(view(forks=[1] * 4, since_fork=[19] * 4, lengths=[80] * 4))
        .any()
    )
    assert (
        spacing(expected_length=100.0)
        .open(view(forks=[1] * 4, since_fork=[20] * 4, lengths=[80] * 4))
        .all()
    )


def test_nothing_forks_before_a_batch_has_been_seen():
    rule = EntropyRule(spacing())
    assert not rule.choose(view()).any()
    rule.learn([forest([-1, -1], leaves=[0, 1], planned_roots=2)])
    assert rule.threshold == 0.5  # of tokens that all have entropy 0.5
    assert rule.spacing.expected_length == pytest.approx(0.7 * 40 + 0.3 * 3)


def test_the_quantile_is_nudged_toward_the_wanted_forks():
    rule = EntropyRule(spacing(), threshold=0.5)  # wants log2(8 / 2) = 2 forks a path
    rule.learn([forest([-1, -1], leaves=[0, 1], planned_roots=2)])
    assert rule.quantile == pytest.approx(0.88)
    full = forest([-1, 0, 0, 1, 1, 3, 3], leaves=[2, 4, 5, 6], planned_roots=1)
    assert forks_per_path([full]) == pytest.approx((1 + 2 + 3 + 3) / 4)
    rule.learn([full])
    assert rule.quantile == pytest.approx(0.90)


def test_each_prompt_has_its_own_expected_length():
    rows = {"forks": [1] * 4, "since_fork": [19] * 4, "lengths": [80] * 4}
    # A fifth of it: gaps of 20 where nothing is known, of 19, of 19.2 and, at least, of 8.
    found = spacing(expected_length=100.0).open(view(**rows, expected=[np.nan, 95.0, 96.0, 10.0]))
    assert found.tolist() == [False, True, False, True]
    # Forks unlock along it: the second of three after a third of 30, 60, 90 or 120 tokens.
    rows = {"forks": [1] * 4, "since_fork": [20] * 4, "lengths": [25] * 4}
    found = spacing(expected_length=60.0).open(view(**rows, expected=[30.0, np.nan, 90.0, 120.0]))
    assert found.tolist() == [True, True, False, False]


def test_expected_lengths_reach_the_rule(policy):
    seen = {}

    class Watching:
        def choose(self, view: LiveView) -> np.ndarray:
            for tree, tokens in zip(view.trees.tolist(), view.expected.tolist(), strict=True):
                seen.setdefault(tree, set()).add(tokens if tokens == tokens else None)
            return np.zeros(len(view.trees), bool)

    sample(policy, Watching(), expected_tokens=[12.5, None, 3.0, None])
    assert seen == {0: {12.5}, 1: {None}, 2: {3.0}, 3: {None}}


def test_rules_fork_real_trees(policy):
    rule = EntropyRule(spacing(expected_length=24.0))
    first = sample(policy, rule)
    assert forks_per_path(first) == 0
    rule.learn(first)
    second = sample(policy, rule)
    assert forks_per_path(second) > 0
    assert_exact(policy, second)
