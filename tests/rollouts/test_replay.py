"""Which groups are kept for later, and which come back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from forests import flat_group, scored

from localrl.learning.credit import assign_credit, with_expected_reward
from localrl.learning.staleness import with_old_logprobs
from localrl.records import Example
from localrl.rollouts.replay import CAPACITY, Replay, ReplayCounts
from localrl.training.state import TYPES
from localrl.utils.codec import decode, encode

PROMPT = flat_group(1).prompt_ids


def group(name: str, rewards=(1.0, 0.0), stale: tuple[int, ...] = ()):
    """A flat group of the example with this id; the roots in `stale` are of an earlier policy."""
    plain = flat_group(len(rewards))
    nodes = tuple(
        replace(node, old_logprobs=node.sampled_logprobs) if n in stale else node
        for n, node in enumerate(plain.nodes)
    )
    example = Example(id=name, messages=({"role": "user", "content": name},))
    return scored(replace(plain, example=example, nodes=nodes), rewards)


def filled(names="abcdefgh", updates=0) -> Replay:
    replay = Replay()
    replay.add([group(name) for name in names], updates)
    return replay


def draw(replay, count=100, *, updates=1, max_age=8, share=0.5, prompt=PROMPT, key=0, exclude=()):
    found = replay.draw(
        count,
        updates=updates,
        max_age=max_age,
        difficulty=share if callable(share) else lambda example: share,
        encode=lambda example: prompt,
        address=(0, key, "replay"),
        exclude=exclude,
    )
    return [scored.group.example.id for scored in found]


def test_only_mixed_groups_are_kept():
    replay = Replay()
    replay.add(
        [
            group("mixed", (1.0, 0.0)),
            group("three", (0.3, None, 0.5)),
            group("right", (1.0, 1.0)),
            group("wrong", (0.0, 0.0)),
            group("half known", (1.0, None)),
            group("unknown", (None, None)),
        ],
        0,
    )
    assert sorted(draw(replay)) == ["mixed", "three"]


def test_draws_depend_on_the_address_and_the_example_alone():
    first = draw(filled(), 3)
    assert len(set(first)) == 3
    assert draw(filled(), 3) == first
    assert draw(filled("hgfedcba"), 3) == first
    assert draw(filled(), 8)[:3] == first
    # One that is missing makes room, and changes nothing else.
    assert draw(filled([c for c in "abcdefgh" if c != first[0]]), 2) == first[1:]
    assert {tuple(draw(filled(), 3, key=key)) for key in range(20)} > {tuple(first)}


def test_every_group_has_the_same_chance():
    replay = filled()
    drawn = [name for key in range(400) for name in draw(replay, 2, key=key)]
    shares = np.array([drawn.count(name) for name in "abcdefgh"]) / 400
    np.testing.assert_allclose(shares, 0.25, atol=0.08)  # four standard deviations


def test_age():
    replay = filled("a", updates=3)
    assert draw(replay, updates=3) == []  # age 0: it was this policy's
    assert draw(replay, updates=4, max_age=2) == ["a"]
    assert draw(replay, updates=5, max_age=2) == ["a"]
    assert replay.counts == ReplayCounts(drawn=2)
    assert draw(replay, updates=6, max_age=2) == []
    assert len(replay) == 0
    assert replay.counts == ReplayCounts(drawn=2, age=1)


def test_the_newest_group_of_an_example_replaces_the_older_one():
    replay = filled("ab", updates=0)
    newer = group("a", (0.0, 1.0, 1.0))
    replay.add([newer], 5)
    assert len(replay) == 2
    assert draw(replay, updates=6, max_age=3) == ["a"]
    (found,) = replay.draw(
        1,
        updates=6,
        max_age=3,
        difficulty=lambda _: 0.5,
        encode=lambda _: PROMPT,
        address=(0,),
    )
    assert found.rewards == newer.rewards
    # A group that is not mixed leaves the older one where it is.
    replay.add([group("a", (1.0, 1.0))], 6)
    assert draw(replay, updates=7, max_age=3) == ["a"]


def test_the_oldest_leave_when_there_are_too_many():
    replay = Replay(capacity=3)
    replay.add([group(name) for name in "abc"], 0)
    replay.add([group("a"), group("d")], 1)  # a is new again, so b is the oldest
    assert sorted(draw(replay, updates=2)) == ["a", "c", "d"]
    assert Replay().capacity == CAPACITY


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.05, False), (0.1, True), (0.9, True), (0.95, False), (None, False)],
)
def test_prompts_too_easy_or_too_hard_are_passed_over(share, kept):
    replay = filled("ab")
    assert sorted(draw(replay, share=share)) == (["a", "b"] if kept else [])
    assert len(replay) == 2  # they may become fit again
    assert replay.counts.difficulty == (0 if kept else 2)


def test_difficulty_is_asked_of_each_example():
    assert draw(filled("ab"), share=lambda example: {"a": 0.5, "b": 1.0}[example.id]) == ["a"]


def test_a_prompt_that_is_encoded_otherwise_is_forgotten():
    replay = filled("ab")
    assert draw(replay, prompt=(*PROMPT, 9)) == []
    assert replay.counts == ReplayCounts(prompt=2)
    assert len(replay) == 0


def test_examples_sampled_in_this_step_are_left_alone():
    replay = filled("abc")
    assert sorted(draw(replay, exclude={"a", "c"})) == ["b"]
    assert replay.counts == ReplayCounts(drawn=1)
    assert len(replay) == 3


def test_rejected_groups_are_forgotten():
    replay = filled("ab")
    replay.reject(group("a"))
    replay.reject(group("a"))
    assert draw(replay) == ["b"]
    assert replay.counts == ReplayCounts(drawn=1, drift=1)


def test_groups_with_tokens_of_an_earlier_policy():
    replay = Replay()
    replay.add([group("all", stale=(0, 1)), group("some", stale=(0,))], 4)
    found = replay.draw(
        2,
        updates=5,
        max_age=1,
        difficulty=lambda _: 0.5,
        encode=lambda _: PROMPT,
        address=(0,),
    )
    assert [scored.group.example.id for scored in found] == ["some"]
    assert all(node.old_logprobs is None for node in found[0].group.nodes)


def test_what_was_expected_is_kept_with_a_group():
    """The baseline of a replayed group knows nothing that was learned from it."""
    replay = Replay()
    expecting = replace(group("a"), group=with_expected_reward(group("a").group, 0.9))
    replay.add([expecting], 0)
    tree, arrays = encode(replay, TYPES)
    (found,) = stored(decode(tree, arrays, TYPES))
    now = with_old_logprobs(found.group, [n.sampled_logprobs for n in found.group.nodes])
    later = with_expected_reward(now, 0.5)
    assert [node.expected_reward for node in later.nodes] == [0.9, 0.9]
    credit = assign_credit(replace(found, group=later), kappa=4)
    assert credit.advantages == pytest.approx([1 - 3.6 / 5, -(1 + 3.6) / 5])


def test_a_group_of_an_older_checkpoint_is_compared_with_itself_alone():
    tree, arrays = encode(filled("a"), TYPES)
    older = json.loads(json.dumps(tree), object_hook=without_expectation)
    (found,) = stored(decode(older, arrays, TYPES))
    assert assign_credit(found, kappa=4).advantages == (1, -1)


def without_expectation(tree):
    return {name: value for name, value in tree.items() if name != "expected_reward"}


def stored(replay):
    return replay.draw(
        1,
        updates=1,
        max_age=1,
        difficulty=lambda _: 0.5,
        encode=lambda _: PROMPT,
        address=(0,),
    )


def test_nothing_to_draw():
    assert draw(Replay()) == []
    assert draw(filled(), 0) == []
    everything = filled("abc")
    assert sorted(draw(everything, 100)) == ["a", "b", "c"]
    assert sorted(draw(everything, 100, updates=2)) == ["a", "b", "c"]
