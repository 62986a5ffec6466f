from __future__ import annotations

from localrl.tasks.builtin import load_task
from localrl.tasks.order import take


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
