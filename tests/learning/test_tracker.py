from __future__ import annotations

import math
from dataclasses import replace

import pytest
from forests import flat_group, forest, scored

from localrl.learning.credit import assign_credit
from localrl.learning.tracker import FLOOR, HALF_LIFE, Tracker
from localrl.records import Example, ScoredGroup


def update(tracker, *groups):
    tracker.update(groups, [assign_credit(group) for group in groups])


def example(name: str) -> Example:
    return Example(id=name, messages=({"role": "user", "content": name},))


def of(name: str, rewards, tokens: int = 3) -> ScoredGroup:
    """A flat group of another prompt, its completions of so many tokens."""
    group = flat_group(len(rewards), [True] * tokens)
    return scored(replace(group, example=example(name)), rewards)


def test_nothing_is_known_before_the_first_reward():
    tracker = Tracker()
    update(tracker, scored(flat_group(2), [None, None]))
    assert tracker.value("hand-made") is None
    assert tracker.expected_tokens("hand-made") is None
    assert tracker.posterior("hand-made") == (1, 1)


def test_worked_by_hand():
    tracker = Tracker()
    update(tracker, scored(flat_group(4), [1, 0, 0, 0]))
    # Nothing was known: total 1, count 4, and the mean of all is the same.
    assert tracker.value("hand-made") == pytest.approx(1 / 4)
    assert tracker.value("another") == pytest.approx(1 / 4)
    update(tracker, scored(flat_group(4), [1, 1, 1, 1]))
    # No drift: 0.96 stays, and 0.04 of the prior's 2 completions, of mean 1/4, come in.
    total, count = 0.96 * 1 + 0.04 * 0.5 + 4, 0.96 * 4 + 0.04 * 2 + 4
    assert tracker.value("hand-made") == pytest.approx(total / count)
    assert tracker.value("another") == pytest.approx((0.99 * 1 + 4) / (0.99 * 4 + 4))


@pytest.mark.parametrize(
    ("nats", "kept"),
    [
        (0.0, 0.96),
        (0.06 * math.log2(1 / 0.95), 0.95),
        (0.06 * math.log2(1 / 0.9), 0.9),
        (0.06, 0.875),  # a half would stay
        (9.0, 0.875),
    ],
)
def test_drift_decides_what_is_kept(nats, kept):
    tracker = Tracker()
    tracker.drifted(5.0)  # before anything is known there is nothing to forget
    update(tracker, scored(flat_group(4), [0, 0, 0, 1]))
    # In parts, between which another prompt is seen: the clock runs from the prompt's own visit.
    tracker.drifted(nats / 4)
    update(tracker, of("other", [0, 0, 0, 1]))
    tracker.drifted(3 * nats / 4)
    update(tracker, scored(flat_group(4), [1, 1, 1, 0]))
    # The mean of all is 1/4 throughout, so the prior adds 1/2 in 2.
    total, count = kept * 1 + (1 - kept) * 0.5 + 3, kept * 4 + (1 - kept) * 2 + 4
    assert tracker.value("hand-made") == pytest.approx(total / count)
    assert sum(tracker.posterior("hand-made")) == pytest.approx(count)


def test_a_first_visit_starts_from_the_prior_whatever_the_drift():
    tracker = Tracker()
    update(tracker, of("other", [1, 0, 0, 0]))
    tracker.drifted(1.0)
    update(tracker, scored(flat_group(2), [1, 1]))
    assert tracker.posterior("hand-made") == pytest.approx((0.5 + 2, 1.5))


def test_completions_that_share_tokens_count_for_less():
    group = forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2)
    tracker = Tracker()
    update(tracker, of("other", [0, 0]))
    update(tracker, scored(group, [1, 0, 0]))
    # Worth 1/2 (the lone root's share), counted as 2 roots and half a leaf; 2 of the prior.
    assert tracker.value("hand-made") == pytest.approx(2.5 * 0.5 / (2 + 2.5))


def test_a_missing_reward_is_not_a_zero():
    tracker = Tracker()
    update(tracker, scored(flat_group(3), [1, None, 1]))
    assert tracker.value("another") == pytest.approx(1.0)


def test_it_follows_a_policy_that_improves():
    moving, still = Tracker(), Tracker()
    for rewards, times in (([0] * 4, 50), ([1] * 4, 25)):
        for _ in range(times):
            moving.drifted(HALF_LIFE)
            for tracker in (moving, still):
                update(tracker, scored(flat_group(4), rewards))
    assert moving.value("hand-made") > 0.85
    assert 0.5 < still.value("hand-made") < 0.75


def test_rewards_of_0_and_1_have_a_beta_posterior():
    tracker = Tracker()
    update(tracker, scored(flat_group(4), [1, 0, 0, 0]))
    assert tracker.posterior("hand-made") == pytest.approx((1, 3))
    assert tracker.posterior("another") == pytest.approx((0.5, 1.5))
    update(tracker, scored(flat_group(4), [1, 1, 0, 0]))
    right, wrong = tracker.posterior("hand-made")
    assert right + wrong == pytest.approx(0.96 * 4 + 0.04 * 2 + 4)
    assert right / (right + wrong) == pytest.approx(tracker.value("hand-made"))


def test_other_rewards_are_placed_within_the_range_seen():
    tracker = Tracker()
    assert [tracker.place(reward) for reward in (-3, 0, 0.25, 1, 7)] == [0, 0, 0.25, 1, 1]
    update(tracker, scored(flat_group(4), [-1, 3, None, 1]))
    # Single rewards reach from -1 to 3, even though their mean is 1.
    assert [tracker.place(reward) for reward in (-3, -1, 0, 1, 3, 7)] == [0, 0, 0.25, 0.5, 1, 1]
    assert tracker.value("hand-made") == pytest.approx(1)
    assert tracker.posterior("hand-made") == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(("reward", "posterior"), [(0, (FLOOR, 4)), (1, (4, FLOOR))])
def test_a_posterior_is_never_certain(reward, posterior):
    tracker = Tracker()
    update(tracker, scored(flat_group(4), [reward] * 4))
    assert tracker.posterior("hand-made") == pytest.approx(posterior)


def test_expected_tokens():
    tracker = Tracker()
    update(tracker, of("short", [1, 0, 0, 0], tokens=3))
    assert tracker.expected_tokens("short") == pytest.approx(3)
    assert tracker.expected_tokens("unseen") == pytest.approx(3)
    update(tracker, of("long", [1, 0, 0, 0], tokens=6))
    # Two of the prior, of 3 tokens, and four of 6.
    assert tracker.expected_tokens("long") == pytest.approx((2 * 3 + 4 * 6) / 6)
    overall = (0.99 * 12 + 24) / (0.99 * 4 + 4)
    assert tracker.expected_tokens("unseen") == pytest.approx(overall)
    update(tracker, of("long", [0, 0], tokens=9))
    kept = 0.96 * 30 + 0.04 * 2 * overall, 0.96 * 6 + 0.04 * 2
    assert tracker.expected_tokens("long") == pytest.approx((kept[0] + 18) / (kept[1] + 2))
