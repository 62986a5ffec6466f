"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.config import RunConfig
from localrl.errors import ConfigError
from localrl.learning.schedule import rate_factor
from localrl.settings import LR_SCHEDULES
from localrl.training.resuming import changed_settings


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_two_updates_of_warm_up_and_four_after_them(schedule, factors):
    found = [rate_factor(schedule, done, warmup=2, planned=6) for done in range(6)]
    assert found == pytest.approx(factors)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.sampled_from(LR_SCHEDULES), st.integers(0, 20), st.integers(0, 60))
def test_it_rises_to_1_and_then_only_falls(schedule, warmup, planned):
    found = [rate_factor(schedule, n, warmup=warmup, planned=planned) for n in range(planned)]
    assert all(0 < factor <= 1 for factor in found)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup < planned:
        assert max(found) == 1
    # A run that makes more updates than planned, as without a plan, never goes below 0.
    assert rate_factor(schedule, planned + 9, warmup=0, planned=planned) >= 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_fixes_the_number_of_steps_of_a_run(schedule):
    old = RunConfig().replace("learning.lr_schedule", schedule)
    assert changed_settings(old, old.replace("run.minutes", 5.0)) == {"run.minutes": (None, 5.0)}
    with pytest.raises(ConfigError, match=r"run\.steps was 100 and is 200") as error:
        changed_settings(old, old.replace("run.steps", 200))
    assert "run.minutes" in str(error.value).partition("may change")[2]
    assert "run.steps" not in str(error.value).partition("may change")[2]
