"""What the next plan is after a step, by what the step took and how the machine is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from localrl.config import RunConfig
from localrl.memory.adapting import (
    CALM_STEPS,
    LARGER,
    NEAR,
    OURS,
    ROOM,
    SPARE,
    SWAPPED,
    YIELDS,
    MemoryMonitor,
    MemoryReading,
    for_longer,
    shrink_plan,
    smaller,
)
from localrl.memory.estimate import PRIORS
from localrl.memory.limit import Limit
from localrl.memory.machine import Machine
from localrl.memory.plan import LEAST_CHUNK, PromptLength, changes, fit
from localrl.memory.sizes import read_sizes
from localrl.records import MemoryPlan
from localrl.training.memory_plan import plan_request

GB = 10**9
PLAN = MemoryPlan(
    group_size=4,
    decode_rows=20,
    prefill_rows=10,
    micro_rows=5,
    head_chunk=100,
    max_prompt_tokens=64,
    max_completion_tokens=100,
    grad_checkpoint=False,
    dequantise=True,
    threads=2,
    predicted_bytes=8 * GB,
    limit_bytes=10 * GB,
    reason="",
)
HOST = Machine("Linux", "cpu", total_bytes=64 * GB, available_bytes=32 * GB, pressure="normal")
ROWS = ("decode_rows", "prefill_rows", "micro_rows", "head_chunk")
LEAST = replace(PLAN, decode_rows=1, prefill_rows=1, micro_rows=1, head_chunk=LEAST_CHUNK)


def reading(share=0.9, *, cached=0, **machine) -> MemoryReading:
    """After a step that took this share of the limit."""
    return MemoryReading(int(share * 10 * GB), cached, replace(HOST, **machine))


def see(plan, found, watch=None, *, least_rows=1, may_checkpoint=True):
    watch = watch or MemoryMonitor(plan)
    return watch.see(plan, found, least_rows=least_rows, may_checkpoint=may_checkpoint)


def test_a_step_well_below_the_limit_changes_nothing():
    assert see(PLAN, reading(0.9)) is None
    assert see(PLAN, reading(0.1)) is None


def test_near_the_limit_batches_are_a_fifth_smaller():
    assert see(PLAN, reading(NEAR)) is None
    plan, why = see(PLAN, reading(NEAR + 0.001))
    assert [getattr(plan, row) for row in ROWS] == [16, 8, 4, 80]
    assert changes(PLAN, plan).keys() == set(ROWS)
    assert why == "a peak of 9.5 GB and 0 MB of freed buffers, close to the limit of 10.0 GB"


def test_freed_buffers_count():
    assert see(PLAN, reading(0.9, cached=GB // 4)) is None
    plan, why = see(PLAN, reading(0.9, cached=GB))
    assert plan.micro_rows == 4
    assert "1.0 GB of freed buffers" in why


@pytest.mark.parametrize("pressure", ["warn", "critical"])
def test_pressure_makes_batches_smaller(pressure):
    plan, why = see(PLAN, reading(0.1, pressure=pressure))
    assert plan.decode_rows == 16
    assert why == f"the system's memory pressure is {pressure}"


def test_little_free_memory_makes_batches_smaller():
    assert see(PLAN, reading(0.1, available_bytes=int(SPARE * 64 * GB) + 1)) is None
    plan, why = see(PLAN, reading(0.1, available_bytes=int(SPARE * 64 * GB) - 1))
    assert plan.decode_rows == 16
    assert why == "only 2.6 GB of this machine's 64.0 GB is available"


def test_what_is_not_known_is_no_reason():
    unknown = {"total_bytes": None, "available_bytes": None, "pressure": None}
    assert see(PLAN, reading(0.5, **unknown)) is None
    assert see(replace(PLAN, limit_bytes=None), reading(5.0, **unknown)) is None
    assert see(replace(PLAN, limit_bytes=None), reading(5.0, pressure="warn")) is not None


def test_a_tree_is_decoded_whole():
    plan, _ = see(PLAN, reading(1.0), least_rows=18)
    assert plan.decode_rows == 18
    plan, _ = see(plan, reading(1.0), least_rows=18)
    assert (plan.decode_rows, plan.prefill_rows) == (18, 6)


def test_nothing_falls_below_its_least():
    plan, steps = PLAN, 0
    while (found := see(plan, reading(0.96), may_checkpoint=False)) is not None:
        plan, steps = found[0], steps + 1
        assert steps < 50
    assert changes(LEAST, plan) == {}
    # Asked for smaller chunks, they stay as they are.
    few = replace(LEAST, head_chunk=3)
    assert shrink_plan(few, least_rows=1, may_checkpoint=False) is None


def test_blocks_are_recomputed_once_the_update_has_one_row():
    two = replace(PLAN, micro_rows=2)
    plan, _ = see(two, reading(1.0))
    assert (plan.micro_rows, plan.grad_checkpoint) == (1, False)
    plan, _ = see(plan, reading(1.0))
    assert plan.grad_checkpoint
    assert shrink_plan(LEAST, least_rows=1, may_checkpoint=True) == replace(
        LEAST, grad_checkpoint=True
    )


def test_the_length_falls_last_and_only_above_the_limit():
    floor = replace(LEAST, grad_checkpoint=True)
    assert see(floor, reading(0.99)) is None
    assert see(floor, reading(0.5, pressure="critical")) is None
    plan, why = see(floor, reading(1.01))
    assert changes(floor, plan) == {"max_completion_tokens": (100, 80)}
    assert why.endswith("batches cannot shrink further: completions now end at 80 tokens")
    for _ in range(20):
        plan = (see(plan, reading(1.01)) or (plan, ""))[0]
    assert 16 <= plan.max_completion_tokens < 20


def test_after_calm_steps_it_grows_up_to_what_it_was():
    watch, plan = MemoryMonitor(PLAN), smaller(smaller(PLAN, least_rows=1), least_rows=1)
    sizes = [plan.decode_rows]
    for step in range(1, 4 * CALM_STEPS + 1):
        found = see(plan, reading(ROOM - 0.01), watch)
        assert (found is not None) == (step % CALM_STEPS == 0 and plan.decode_rows < 20)
        if found is not None:
            grown, why = found
            assert why == f"{CALM_STEPS} steps with room to spare"
            for row in ROWS:
                now, most = getattr(grown, row), getattr(PLAN, row)
                before = getattr(plan, row)
                assert now == min(most, max(before + 1, int(LARGER * before)))
            plan = grown
            sizes.append(plan.decode_rows)
    assert sizes == [12, 15, 18, 20]
    assert {row: getattr(plan, row) for row in ROWS} == {row: getattr(PLAN, row) for row in ROWS}


def test_it_does_not_grow_without_room_nor_after_a_tight_step():
    watch, plan = MemoryMonitor(PLAN), smaller(PLAN, least_rows=1)
    for _ in range(3 * CALM_STEPS):
        assert see(plan, reading(ROOM + 0.01), watch) is None
    for _ in range(CALM_STEPS - 1):
        assert see(plan, reading(0.5), watch) is None
    assert see(plan, reading(0.5, pressure="warn"), watch) is not None
    for _ in range(CALM_STEPS - 1):
        assert see(plan, reading(0.5), watch) is None
    assert see(plan, reading(0.5), watch) is not None


def test_what_was_never_given_up_is_no_reason_to_grow():
    watch = MemoryMonitor(PLAN)
    for _ in range(3 * CALM_STEPS):
        assert see(PLAN, reading(0.1), watch) is None


def test_smaller_batches_are_a_fifth_smaller():
    once = smaller(PLAN, least_rows=1)
    assert [getattr(once, row) for row in ROWS] == [16, 8, 4, 80]
    assert smaller(PLAN, least_rows=19).decode_rows == 19
    assert smaller(PLAN, least_rows=30).decode_rows == 20


MANY = replace(PLAN, decode_rows=128, prefill_rows=16, micro_rows=8, limit_bytes=int(9.2 * GB))
"""Of a run on a Mac whose step takes about a fifth of its limit."""


def simulate(machines, *, peak=2 * GB, plan=MANY):
    """The plans after each of these readings, with a step that takes this much."""
    watch, plans = MemoryMonitor(plan), [plan]
    for machine in machines:
        found = see(plans[-1], MemoryReading(peak, 0, machine), watch)
        plans.append(found[0] if found else plans[-1])
    return plans


def lasting(pressure, *, swap_per_step=0, steps=400, **more):
    return [
        replace(HOST, pressure=pressure, swap_used_bytes=n * swap_per_step, **more)
        for n in range(steps)
    ]


@pytest.mark.parametrize(
    "machines",
    [
        lasting("warn"),
        lasting("critical"),
        lasting("normal", available_bytes=GB),
        lasting("warn", swap_per_step=int(SWAPPED * 64 * GB) // 400),  # too little to notice
    ],
)
def test_pressure_of_others_that_lasts_is_yielded_to_twice(machines):
    plans = simulate(machines)
    rows = [plan.decode_rows for plan in plans]
    assert rows[:3] == [128, 102, 81]
    assert set(rows[3:]) == {81}
    assert not plans[-1].grad_checkpoint


def test_pressure_that_comes_and_goes_does_not_wear_batches_down():
    """Ten calm steps give back one shrinking, and the next pressure takes one."""
    calm = [HOST] * CALM_STEPS
    rows = [plan.decode_rows for plan in simulate([*lasting("warn", steps=5), *calm] * 30)]
    assert min(rows) >= 64
    assert rows[-1] > 80


def test_when_pressure_has_passed_batches_grow_again():
    plans = simulate([*lasting("warn", steps=50), *[HOST] * (3 * CALM_STEPS)])
    assert plans[50].decode_rows == 81
    assert plans[50 + CALM_STEPS - 1] == plans[50]
    assert plans[50 + CALM_STEPS].decode_rows == 101
    assert plans[-1].decode_rows == 128


def test_pressure_that_gets_worse_is_yielded_to_once_more():
    rows = [
        plan.decode_rows
        for plan in simulate([*lasting("warn", steps=20), *lasting("critical", steps=20)])
    ]
    assert rows[20:22] == [81, 64]
    assert set(rows[22:]) == {64}


def test_critical_pressure_with_growing_swap_shrinks_to_the_floor():
    plans = simulate(lasting("critical", swap_per_step=int(SWAPPED * 64 * GB) + 1))
    assert changes(replace(LEAST, grad_checkpoint=True), plans[-1]) == {}


def test_pressure_that_is_ours_is_answered_at_every_step():
    """Until the step takes less than half of the limit."""
    half = int(OURS * 9.2 * GB)
    assert simulate(lasting("warn"), peak=half + 1)[-1].decode_rows == 1
    assert simulate(lasting("warn"), peak=half)[-1].decode_rows == 81
    assert YIELDS == 2


SHORT = PromptLength(32, "a test")


def request(limit):
    """What a run with short prompts wants under a limit of so many bytes."""
    wish = {"model.path": "m", "rollout.max_completion_tokens": 64, "rollout.group_size": 8}
    made = plan_request(RunConfig.create(wish), read_sizes(tiny.CONFIG), HOST, prompts=SHORT)
    return replace(made, limit=Limit(limit, "a test", from_machine=False))


def test_longer_prompts_take_rows_and_neither_group_nor_length():
    found = request(30 * 10**6)
    plan = fit(found)
    assert plan.max_prompt_tokens == 32
    later, longer = for_longer(found, plan, 400, PRIORS)
    assert longer.max_prompt_tokens == later.plan.max_prompt_tokens == 400
    kept = ("group_size", "max_completion_tokens", "dequantise")
    assert [getattr(longer, n) for n in kept] == [getattr(plan, n) for n in kept]
    assert all(getattr(longer, n) <= getattr(plan, n) for n in ROWS)
    assert longer.decode_rows < plan.decode_rows
    assert (
        longer.predicted_bytes
        <= 30 * 10**6
        < later.estimate(replace(plan, max_prompt_tokens=400)).peak
    )
    assert "prompts of up to 400 tokens, as seen in training" in longer.reason


def test_longer_prompts_never_bring_back_what_was_given_up():
    found = request(10**12)
    less = replace(fit(found), decode_rows=3, micro_rows=2, grad_checkpoint=True)
    longer = for_longer(found, less, 400, PRIORS)[1]
    assert (longer.decode_rows, longer.micro_rows, longer.grad_checkpoint) == (3, 2, True)


def test_longer_prompts_that_cannot_fit_take_the_fewest_rows():
    found = request(30 * 10**6)
    longer = for_longer(found, fit(found), 100_000, PRIORS)[1]
    assert (longer.decode_rows, longer.prefill_rows, longer.micro_rows) == (1, 1, 1)
    assert longer.predicted_bytes > longer.limit_bytes
