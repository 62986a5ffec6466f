"""Buffers are lent again once nobody looks at them, and never while anybody does."""

import gc
import threading

import numpy as np
import pytest
from waiting import DEADLINE_S

from localrl.backend import mx
from localrl.engines.cpu import buffers
from localrl.engines.cpu.buffers import empty, release_all

COUNT = 1 << 16


@pytest.fixture(autouse=True)
def fresh():
    release_all()
    gc.collect()
    mx.synchronize()  # what an earlier graph held is given back by another thread
    mx.clear_cache()  # a buffer that is used again may be larger than what is in it
    yield
    release_all()


def place(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_buffer_is_lent_again_when_its_last_view_has_gone():
    first = empty((COUNT,))
    where = place(first)
    view = first.reshape(256, -1)[3:, ::2].T
    del first
    assert place(empty((COUNT,))) != where
    del view
    assert place(empty((4, COUNT // 4))) == where
    assert place(empty((COUNT,))) == where


def test_arrays_in_use_never_meet():
    arrays = []
    for n in range(40):
        array = empty((COUNT,))
        array[:] = n
        arrays.append(array if n % 3 else array[::2])
        if n % 4 == 0:
            del arrays[n // 3]
    values = [set(np.unique(array)) for array in arrays]
    assert all(len(value) == 1 for value in values)
    assert len(set.union(*values)) == len(arrays)


def test_mlx_counts_them_until_they_are_given_back():
    before = mx.get_active_memory()
    array = empty((COUNT,))
    assert mx.get_active_memory() - before == 4 * COUNT
    release_all()
    assert mx.get_active_memory() - before == 4 * COUNT
    del array
    assert mx.get_active_memory() == before


def test_little_is_kept_free(monkeypatch):
    monkeypatch.setattr(buffers, "SPARE", 8 * COUNT)
    before = mx.get_active_memory()
    held = [empty((COUNT,)) for _ in range(10)]
    large = empty((9 * COUNT,))
    del held, large
    kept = empty((COUNT // 2,))
    assert mx.get_active_memory() - before == 8 * COUNT + kept.nbytes


def test_small_arrays_are_numpys():
    before = mx.get_active_memory()
    assert empty((3, 5)).shape == (3, 5)
    assert mx.get_active_memory() == before


def test_threads_at_once():
    problems = []

    def work(number: int) -> None:
        for _ in range(300):
            arrays = [empty((COUNT // 8,)) for _ in range(3)]
            for n, array in enumerate(arrays):
                array[:] = 10 * number + n
            if any((array != 10 * number + n).any() for n, array in enumerate(arrays)):
                problems.append(number)

    callers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert not any(caller.is_alive() for caller in callers)
    assert not problems
