"""Reward functions that are objects of this process: as in the worker, but where they are."""

from __future__ import annotations

import asyncio
import functools
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.errors import DataError
from localrl.processes.worker import Reply, Worker
from localrl.rewards.in_process import InProcess

TEXTS = {"completions": ["a", "bb"], "answer": ["x", None]}


def caller(function) -> InProcess:
    worker = Worker(time_limit_s=60.0, memory_limit_bytes=None)  # not started until it is needed
    return InProcess(worker, {"python:f": function})


def call(function, kwargs=TEXTS, state=None) -> Reply:
    return caller(function).call("python:f", kwargs, state=state)


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, completions):
        self.calls += 1
        return [float(self.calls)] * len(completions)


async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(id(asyncio.get_running_loop()) % 997)] * len(completions)


def weigh(completions, factor):
    return [factor * len(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (lambda completions: [len(text) for text in completions], [1, 2]),
        (lambda **kwargs: sorted(kwargs), ["answer", "completions"]),
        (functools.partial(weigh, factor=2), [2, 4]),
        ("ab".join, None),
        (lambda answer, extra=5: [extra, *answer], [5, "x", None]),
    ],
)
def test_functions_of_all_kinds_get_what_they_name(function, value):
    reply = call(function)
    assert reply.value == value
    assert reply.ok == (value is not None)


def test_an_object_keeps_its_state_and_async_functions_their_loop():
    counting, asked = caller(Counting()), caller(later)
    assert [counting.call("python:f", TEXTS).value[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    assert asked.call("python:f", TEXTS) == asked.call("python:f", TEXTS)


def test_an_async_function_works_in_a_notebook():
    """There a loop runs already in the thread that trains."""

    async def cell():
        return call(later)

    assert asyncio.run(cell()).ok


def test_it_runs_in_this_process_and_thread():
    seen = []
    call(lambda completions: seen.append(threading.get_ident()))
    assert seen == [threading.get_ident()]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(value=VALUES)
def test_values_pass_and_are_copies(value):
    """What a function does to its arguments is seen by nobody else."""
    kept = {"column": [value], "rows": [{"a": 1}]}

    def spoil(column, rows):
        rows[0]["a"] = 2
        return column

    assert call(spoil, kept) == Reply(value=[value])
    assert kept["rows"] == [{"a": 1}]


def test_tuples_and_numbers_that_are_none_come_as_in_the_worker():
    given = {"column": (1, (2, 3))}
    assert call(lambda column: column, given).value == [1, [2, 3]]
    assert math.isnan(call(lambda column: [math.nan], given).value[0])
    with pytest.raises(DataError, match="the argument 'column' of python:f cannot be sent"):
        call(lambda column: column, {"column": {1, 2}})


def raises(completions):
    return [completions["key"]]


@pytest.mark.parametrize(
    ("function", "failure", "message"),
    [
        (raises, "raised", "TypeError: list indices must be"),
        (lambda completions: exit(3), "raised", "SystemExit: 3"),
        (lambda completions: {1, 2}, "bad reply", "TypeError: a value of type set cannot"),
        (lambda completions: 10**5000, "bad reply", "ValueError: Exceeds the limit"),
        (lambda missing: 1, "raised", "TypeError: "),
    ],
)
def test_failures_are_replies(function, failure, message):
    reply = call(function)
    assert reply.failure == failure
    assert reply.message.startswith(message)


def test_a_traceback_has_the_users_frames_alone():
    told = call(raises).traceback or ""
    assert 'completions["key"]' in told
    assert "localrl/rewards" not in told
    assert "worker_child.py" not in told


def test_ctrl_c_is_for_the_run():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupted)


def test_hooks_are_given_and_logs_come_back():
    def logging(completions, trainer_state, log_metric, log_extra):
        log_metric("step", trainer_state.global_step)
        log_extra("size", [len(text) for text in completions])

    logs = call(logging, state={"global_step": 7}).logs
    assert logs == {"metrics": [["step", 7.0]], "extra": [["size", [1, 2]]]}


def test_what_is_not_here_is_the_workers():
    with Worker(time_limit_s=60.0, memory_limit_bytes=None) as worker:
        both = InProcess(worker, {"python:f": raises})
        assert both.call("math:fsum", {"seq": [1, 2]}).failure == "raised"
        assert both.resolve("json:no_such").message == "json has no 'no_such'"
        assert not both.wants("os.path:basename", "answer")
    assert both.resolve("python:f") == Reply(value=["completions"])
    assert "only that program has" in both.resolve("python:other").message


def test_environments_are_not_here():
    explicit, any_of_them = (
        (lambda completions, environments: []),
        (lambda **kwargs: sorted(kwargs)),
    )
    assert "live in another process" in caller(explicit).resolve("python:f").message
    kwargs = {**TEXTS, "environments": [1, 2]}
    assert call(any_of_them, kwargs).value == ["answer", "completions"]
