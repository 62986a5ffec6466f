from __future__ import annotations

import pytest
from forests import flat_group, forest, scored

from localrl.learning.credit import assign_credit
from localrl.learning.tracker import Tracker


def update(tracker, *groups):
    tracker.update(groups, [assign_credit(group) for group in groups])


def test_nothing_is_known_before_the_first_reward():
    tracker = Tracker()
    assert tracker.value("hand-made") is None
    update(tracker, scored(flat_group(2), [None, None]))
    assert tracker.value("hand-made") is None


def test_worked_by_hand():
    tracker = Tracker()
    update(tracker, scored(flat_group(4), [1, 0, 0, 0]))
    # The prior's mean was 0: total 4 * 0.25, count 0.9 + 0.1 + 4.
    assert tracker.value("hand-made") == pytest.approx(1 / 5)
    assert tracker.value("another") == pytest.approx(1 / 4)  # the mean of all
    update(tracker, scored(flat_group(4), [1, 1, 1, 1]))
    total = 0.9 * 1 + 0.1 * 0.25 + 4
    assert tracker.value("hand-made") == pytest.approx(total / (0.9 * 5 + 0.1 + 4))


def test_completions_that_share_tokens_count_for_less():
    group = forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2)
    tracker = Tracker()
    update(tracker, scored(group, [1, 0, 0]))
    # Worth 1/2 (the lone root's share), counted as 2 roots and half a leaf.
    assert tracker.value("hand-made") == pytest.approx(2.5 * 0.5 / (1 + 2.5))


def test_a_missing_reward_is_not_a_zero():
    tracker = Tracker()
    update(tracker, scored(flat_group(3), [1, None, 1]))
    assert tracker.value("another") == pytest.approx(1.0)


def test_it_follows_a_policy_that_improves():
    tracker = Tracker()
    for _ in range(50):
        update(tracker, scored(flat_group(4), [0, 0, 0, 0]))
    for _ in range(25):
        update(tracker, scored(flat_group(4), [1, 1, 1, 1]))
    assert tracker.value("hand-made") > 0.85
