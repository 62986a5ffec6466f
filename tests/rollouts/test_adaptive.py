"""Rounds: who gets another one, and that a group in rounds is the flat one in parts."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma

import numpy as np
import pytest
from forests import flat_group, forest, scored

from localrl.records import Example, Group, ScoredGroup
from localrl.rollouts import adaptive
from localrl.rollouts.adaptive import alike, chance_alike, collect
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, join, sample_groups

EVEN = (1.0, 1.0)
TEXTS = ("12", "sum 1 2 3", "a")
EXAMPLES = [Example(id=text, messages=({"role": "user", "content": text},)) for text in TEXTS]


@pytest.mark.parametrize(
    ("rewards", "belief", "left", "chance"),
    [
        ([0, 0], EVEN, 2, 3 / 4 * 4 / 5),
        ([1, 1], EVEN, 2, 3 / 4 * 4 / 5),
        ([1, 1, 1], (2.0, 1.0), 1, 5 / 6),
        ([0], (0.5, 0.5), 3, 1.5 / 2 * 2.5 / 3 * 3.5 / 4),
        ([0, 0], (9.0, 1.0), 2, 3 / 12 * 4 / 13),
        ([0.25, 0.25], EVEN, 1, 2.5 / 4),  # a quarter of a right answer each
        ([0.75, 0.75], EVEN, 1, 2.5 / 4),
        ([0, 0], EVEN, 0, 1.0),
    ],
)
def test_chances_by_hand(rewards, belief, left, chance):
    assert chance_alike(rewards, belief, left) == pytest.approx(chance)


def test_the_chance_is_a_ratio_of_beta_functions():
    def log_beta(a, b):
        return lgamma(a) + lgamma(b) - lgamma(a + b)

    # Of Beta(a, b), the mean of (1 - p)^n.
    expected = exp(log_beta(0.7, 2.4 + 5 + 9) - log_beta(0.7, 2.4 + 5))
    assert chance_alike([0.0] * 5, (0.7, 2.4), 9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0], True),
        ([0.2, 0.2], True),
        ([0.2, 0.3], False),
        ([1, None, 1], True),
        ([1, None, 0], False),
        ([0.4], True),
        ([None, None], False),  # nothing is known of it, so nothing says that more would teach
    ],
)
def test_which_rewards_are_alike(rewards, expected):
    assert alike(scored(flat_group(len(rewards)), rewards)) is expected


class Script:
    """Rewards of each prompt, round by round; `asked` is who was asked for in each round."""

    def __init__(self, *rewards, shape):
        self.rewards, self.shape = rewards, shape
        self.asked: list[list[int]] = []

    def sample(self, which, number) -> list[Group]:
        assert number == len(self.asked)
        self.asked.append(list(which))
        return [flat_group(self.shape.leaves) for _ in which]

    def score(self, groups) -> list[ScoredGroup]:
        number, which = len(self.asked) - 1, self.asked[-1]
        return [scored(g, self.rewards[i][number]) for g, i in zip(groups, which, strict=True)]

    def collect(self, belief=lambda i: EVEN, place=float):
        groups = collect(
            len(self.rewards),
            self.shape,
            self.sample,
            self.score,
            belief=belief,
            place=place,
        )
        return [list(group.rewards) for group in groups]


@pytest.mark.parametrize(
    ("rewards", "give_up", "wanted"),
    [
        ([0, 0], 0.61, True),  # the chance is 3/5
        ([0, 0], 0.59, False),
        ([1, 1], 0.61, True),
        ([0, 0], 1.0, True),
        ([0, 0], 0.0, False),
        ([1, 0], 1.0, False),
        ([0.2, 0.3], 1.0, False),
        ([0.4, None], 1.0, True),
        ([None, None], 1.0, False),
    ],
)
def test_who_wants_more(rewards, give_up, wanted, monkeypatch):
    monkeypatch.setattr(adaptive, "GIVE_UP", give_up)
    script = Script([rewards, [1, 1]], shape=Shape(2, 2, rounds=2))
    script.collect()
    assert script.asked == [[0]] * (1 + wanted)


def test_different_rewards_are_different_wherever_they_are_placed():
    script = Script([[2, 3], [2, 2]], [[3, 3], [2, 2]], shape=Shape(2, 2, rounds=2))
    script.collect(place=lambda reward: 1.0)
    assert script.asked == [[0, 1], [1]]


def test_rounds_go_to_those_alone_that_want_more():
    script = Script(
        [[1, 0]],
        [[0, 0], [0, 1]],
        [[1, 1], [1, 1], [1, 1]],
        [[None, None]],
        [[0, None], [0, 0], [0, 1]],
        shape=Shape(2, 2, rounds=3),
    )
    assert script.collect() == [
        [1, 0],
        [0, 0, 0, 1],
        [1] * 6,
        [None, None],
        [0, None, 0, 0, 0, 1],
    ]
    assert script.asked == [[0, 1, 2, 3, 4], [1, 2, 4], [2, 4]]


def test_one_round_is_all_there_is():
    script = Script([[0, 0]], shape=Shape(2, 2))
    assert script.collect() == [[0, 0]]
    assert script.asked == [[0]]


def test_nothing_more_is_sampled_when_nobody_wants_it():
    script = Script([[1, 0]], [[0, 1]], shape=Shape(2, 2, rounds=4))
    script.collect()
    assert script.asked == [[0, 1]]


def test_those_thought_hopeless_or_easy_are_given_up():
    beliefs = [EVEN, (0.05, 20.0), (20.0, 0.05), (20.0, 0.05)]
    same = [[0, 0]] * 2, [[0, 0]] * 2, [[1, 1]] * 2, [[0, 0]] * 2
    script = Script(*same, shape=Shape(2, 2, rounds=2))
    script.collect(belief=lambda i: beliefs[i])
    assert script.asked == [[0, 1, 2, 3], [0, 3]]  # the last was thought easy, and is not


def test_the_chance_is_that_of_all_rounds_left(monkeypatch):
    # After two wrong ones 3/4 4/5 5/6 6/7 = 3/7 of four more; after four 5/6 6/7 = 5/7 of two.
    for give_up, asked in ((0.6, [[0], [0]]), (0.4, [[0]])):
        monkeypatch.setattr(adaptive, "GIVE_UP", give_up)
        script = Script([[0, 0]] * 3, shape=Shape(2, 2, rounds=3))
        script.collect()
        assert script.asked == asked


def test_rewards_are_placed_before_they_are_counted(monkeypatch):
    script = Script([[-1, -1]] * 2, [[3, 3]] * 2, shape=Shape(2, 2, rounds=2))
    # Right ones are thought likely: two wrong ones surprise, two right ones do not.
    script.collect(belief=lambda i: (9.0, 1.0), place=lambda reward: (reward + 1) / 4)
    assert script.asked == [[0, 1], [0, 1]]
    script = Script([[-1, -1]] * 2, [[3, 3]] * 2, shape=Shape(2, 2, rounds=2))
    monkeypatch.setattr(adaptive, "GIVE_UP", 0.5)
    script.collect(belief=lambda i: (9.0, 1.0), place=lambda reward: (reward + 1) / 4)
    assert script.asked == [[0, 1], [0]]


def test_joined_groups_keep_their_trees_apart():
    first = scored(forest([-1, 0, 0], [1, 2], planned_roots=2), [1.0, None])
    second = scored(forest([-1, -1, 1, 1], [0, 2, 3], planned_roots=2), [0.0, 1.0, 0.5])
    both = join(first, second)
    assert [node.parent for node in both.group.nodes] == [-1, 0, 0, -1, -1, 4, 4]
    assert [leaf.node for leaf in both.group.leaves] == [1, 2, 3, 5, 6]
    assert both.rewards == both.parts["hand"] == (1.0, None, 0.0, 1.0, 0.5)
    assert both.group.planned_roots == 2
    ends = [c.token_ids.tolist() for s in (first, second) for c in s.group.completions()]
    assert [c.token_ids.tolist() for c in both.group.completions()] == ends


def sample(policy, shape, which: Sequence[int] = range(3), number=0):
    examples = [EXAMPLES[i] for i in which]
    return sample_groups(
        Decoder(policy, 1.0, 64),
        examples,
        [policy.tokenizer.encode(example.messages) for example in examples],
        shape,
        rule=None,
        max_completion_tokens=24,
        seed=0,
        step=1,
        version=5,
        round=number,
    )


def in_rounds(policy, shape, rewards):
    """Groups whose completions get a reward by their prompt's number."""
    numbers = {example.id: i for i, example in enumerate(EXAMPLES)}
    return collect(
        len(EXAMPLES),
        shape,
        lambda which, number: sample(policy, shape, which, number),
        lambda groups: [scored(g, rewards(numbers[g.example.id], len(g.leaves))) for g in groups],
        belief=lambda i: EVEN,
        place=float,
    )


def assert_same_nodes(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-4)
        np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-4)
        assert (a.parent, a.cond_weight, a.version) == (b.parent, b.cond_weight, b.version)


@pytest.mark.exact
@pytest.mark.parametrize("shape", [Shape(2, 2, rounds=3), Shape(3, 3, rounds=2), Shape(1, 1, 6)])
def test_rounds_that_never_stop_are_the_flat_group(policy, shape):
    flat = sample(policy, Shape(6, 6))
    parts = in_rounds(policy, shape, lambda prompt, count: [0.0] * count)
    for one, other in zip(flat, parts, strict=True):
        assert one.planned_roots == other.group.planned_roots == 6
        assert one.leaves == other.group.leaves
        assert_same_nodes(one.nodes, other.group.nodes)
        rounds = [node.round for node in other.group.nodes]
        assert rounds == [n // shape.roots for n in range(6)]
        assert all(node.round == 0 for node in one.nodes)


@pytest.mark.exact
def test_a_prompts_rounds_do_not_depend_on_the_others(policy):
    flat = sample(policy, Shape(6, 6))
    # The second prompt is mixed at once, so that it leaves the batch.
    parts = in_rounds(
        policy, Shape(2, 2, 3), lambda prompt, count: [float(prompt == 1 and i) for i in range(2)]
    )
    assert [len(group.rewards) for group in parts] == [6, 2, 6]
    assert [group.group.planned_roots for group in parts] == [6, 6, 6]
    for one, other in zip(flat, parts, strict=True):
        assert_same_nodes(one.nodes[: len(other.rewards)], other.group.nodes)
