"""The time that a run still needs, as its page and `show` say it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localrl.report.facts import seconds_left
from localrl.report.reading import read_run
from localrl.runs.schedule import evaluation_due, evaluations_after

STEPS = [{"step": step, "step_time": 2.0} for step in range(1, 5)]


@pytest.mark.parametrize("every", [0, 1, 3, 5, 100])
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_evaluations_to_come_are_those_that_will_be_due(every, steps):
    for step in range(steps + 1):
        to_come = sum(evaluation_due(later, steps, every) for later in range(step + 1, steps + 1))
        assert evaluations_after(step, steps, every) == to_come


def running(folder, *, every, seconds, scored=0):
    """A run of 10 steps of 2 s each, of which 4 are done, evaluated after step `scored`."""
    run = read_run(folder)
    score = replace(run.scores[0], seconds=seconds, step=scored)
    settings = {**run.settings, "run.steps": 10, "run.eval_every": every}
    return replace(
        run, steps=STEPS, scores=[score], settings=settings, held=True, has_adapter=False
    )


def test_time_left_counts_evaluations(run_copy):
    assert seconds_left(running(run_copy, every=0, seconds=None)) == 12
    assert seconds_left(running(run_copy, every=0, seconds=30.0)) == 12 + 30
    assert seconds_left(running(run_copy, every=3, seconds=30.0)) == 12 + 3 * 30
    assert seconds_left(running(run_copy, every=4, seconds=30.0, scored=4)) == 12 + 2 * 30
    # The one after step 4 goes on as this is read.
    assert seconds_left(running(run_copy, every=4, seconds=30.0)) == 12 + 3 * 30


def test_a_run_records_what_its_evaluations_take(run_copy):
    assert all(score.seconds for score in read_run(run_copy).scores)
