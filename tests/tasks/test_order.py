from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import pytest

from localrl.learning.tracker import Tracker
from localrl.records import Example
from localrl.tasks import order
from localrl.tasks.builtin import load_task
from localrl.tasks.order import ENDLESS, choose, take


def ids(task, cursor, count, seed):
    return [example.id for example in take(task, cursor, count, seed)]


def test_every_epoch_visits_every_example_once_in_another_order():
    task = load_task("steps", train_prompts=20)
    first, second = ids(task, 0, 20, 0), ids(task, 20, 20, 0)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 20
    assert first != second
    assert ids(task, 0, 20, 1) != first


def test_the_cursor_alone_decides():
    task = load_task("steps", train_prompts=20)
    assert ids(task, 15, 10, 3) == ids(task, 15, 4, 3) + ids(task, 19, 6, 3)


def test_endless_tasks_differ_by_seed():
    task = load_task("steps", train_prompts=0)
    assert ids(task, 5, 5, 0) == ids(task, 0, 10, 0)[5:]
    assert not set(ids(task, 0, 100, 0)) & set(ids(task, 0, 100, 1))


@dataclass
class Numbers:
    """A task whose prompts are numbers; of an endless one, some come again and again."""

    train_size: int
    repeat: int = 10**9
    name: str = "numbers"
    description: str = ""
    rewards: tuple = ()

    def train(self, index):
        return Example(id=str(index % self.repeat), messages=({"role": "user", "content": "1"},))

    def evaluation(self, n):
        return []


def drawn(task, step, count, *, share=0.25, seed=0, worth=None):
    """Ids of the prompts of a step; those of the lowest numbers are worth most by default."""

    def low(examples):
        return -np.array([int(example.id) for example in examples])

    found = choose(task, step, count, seed, uniform_share=share, worth=worth or low)
    return [example.id for example in found]


def test_a_share_comes_in_turn_and_the_rest_for_its_worth():
    task = Numbers(12)
    walk = [take(task, place, 1, 0)[0].id for place in range(24)]
    for step in range(1, 9):
        ids = drawn(task, step, 8)
        turn = walk[2 * step - 2 : 2 * step]
        assert ids[:2] == turn
        assert ids[2:] == [i for i in map(str, range(12)) if i not in turn][:6]


def test_ties_of_worth_keep_their_order():
    ids = drawn(Numbers(12), 1, 4, worth=lambda examples: np.ones(len(examples)))
    assert ids[1:] == [i for i in map(str, range(12)) if i != ids[0]][:3]


@pytest.mark.parametrize(
    ("size", "count", "share"),
    [
        (20, 8, 0.1),
        (20, 14, 0.1),  # 1.4 in turn: one of 14 would be less than the share
        (23, 5, 0.5),
        (7, 7, 0.1),
        (5, 4, 1.0),
        (30, 25, 0.1),
        (64, 16, 0.05),
        (1, 1, 0.1),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_starves_however_little_it_is_worth(size, count, share, seed):
    """Every prompt comes at least once in any 2 / share epochs of `size` draws."""

    def hates_most(examples):
        return np.array([0.0 if int(example.id) < 2 else -1.0 for example in examples])

    window = ceil(2 / share * size / count - 1e-9)
    steps = [
        drawn(Numbers(size), step, count, share=share, seed=seed, worth=hates_most)
        for step in range(1, 3 * window + 1)
    ]
    assert all(len(set(ids)) == len(ids) == count for ids in steps)
    for start in range(2 * window + 1):
        assert set().union(*steps[start : start + window]) == {str(i) for i in range(size)}


def test_one_prompt_is_enough():
    assert drawn(Numbers(1), 7, 1) == ["0"]
    # The tracker is then asked about nobody.
    assert drawn(Numbers(1), 7, 1, worth=lambda e: Tracker().worth(e, 0)) == ["0"]


def test_a_step_may_take_the_whole_set():
    for step in range(1, 6):
        assert sorted(drawn(Numbers(6), step, 6, share=0.3)) == list("012345")
        assert sorted(drawn(Numbers(6), step, 6, share=1.0)) == list("012345")


def test_a_step_holds_no_prompt_twice_where_the_walk_begins_anew():
    # 3 of 5 in turn: every second step has the end of one epoch and the start of the next.
    for seed in range(20):
        for step in range(1, 11):
            ids = drawn(Numbers(5), step, 3, share=1.0, seed=seed)
            assert len(set(ids)) == 3


def test_an_endless_task_offers_the_next_few():
    task = Numbers(0)
    stream = [e.id for e in take(task, 0, 3 * ENDLESS * 4, 2)]
    for step in (1, 2, 3):
        offered = stream[(step - 1) * 16 : step * 16]
        ids = drawn(task, step, 4, seed=2, worth=lambda e: np.arange(len(e)))
        assert ids == [offered[0], *offered[:-4:-1]]


def test_an_endless_task_that_repeats_itself():
    ids = drawn(Numbers(0, repeat=5), 3, 4)
    assert len(ids) == len(set(ids)) == 4


def test_choosing_depends_on_step_and_seed_alone():
    def by_chance(step, seed):
        return lambda examples: Tracker().worth(examples, seed, step, "prompts")

    def ids(step, seed):
        return drawn(Numbers(50), step, 8, seed=seed, worth=by_chance(step, seed))

    assert ids(3, 1) == ids(3, 1)
    assert ids(3, 1) != ids(4, 1)
    assert ids(3, 1) != ids(3, 2)


def test_of_a_large_set_a_pool_is_compared(monkeypatch):
    monkeypatch.setattr(order, "POOL", 10)
    pools = []

    def note(examples):
        pools.append({example.id for example in examples})
        return np.arange(len(examples))

    for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        ids = drawn(Numbers(200), step, 4, seed=seed, worth=note)
        assert len(set(ids)) == 4
        assert set(ids[1:]) <= pools[-1]
    assert all(9 <= len(pool) <= 10 for pool in pools)
    assert pools[0] == pools[1]
    assert pools[0] != pools[2] != pools[3] != pools[0]
    # One that is no larger than the pool is compared whole.
    drawn(Numbers(10), 1, 4, worth=note)
    assert len(pools[-1]) == 9
