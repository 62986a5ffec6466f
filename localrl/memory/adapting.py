"""Memory checks between steps: a smaller plan if memory is short, a larger one if there is room.

As long as it helps, only batching changes, so the expected gradient stays the same. If it is other
programs that make memory short, smaller batches help little: the plan yields a little and stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from localrl.memory.estimate import Coefficients
from localrl.memory.limit import show
from localrl.memory.machine import Machine, Pressure
from localrl.memory.plan import LEAST_CHUNK, LEAST_LENGTH, PlanRequest, PromptLength, refit
from localrl.records import MemoryPlan

NEAR = 0.95
"""Fraction of the limit above which the next plan is smaller."""
ROOM, CALM_STEPS = 0.7, 10
"""Fraction of the limit, and number of consecutive steps below it before the plan grows again."""
SMALLER = 0.8
"""Factor on batch sizes when memory is short."""
LARGER = 1.25
SPARE = 0.04
"""Fraction of the machine's memory that must stay available, else the next plan is smaller."""
OURS = 0.5
"""Fraction of the limit above which the machine's shortage counts as caused by this process."""
YIELDS = 2
"""Number of times batches shrink for a shortage that others cause and that gets no worse."""
SWAPPED = 0.03
"""Fraction of the machine's memory by which swap must have grown for the shortage to be worse."""
LEVELS: tuple[Pressure, ...] = ("normal", "warn", "critical")


@dataclass(frozen=True)
class MemoryReading:
    """The memory a step used, and the state of the machine after it."""

    peak_bytes: int
    cached_bytes: int
    machine: Machine


@dataclass
class MemoryMonitor:
    """Adjusts the plan between steps; remembers the initial plan and recent readings."""

    most: MemoryPlan
    """The initial plan: nothing grows beyond it."""
    calm: int = 0
    """Number of consecutive steps with room to spare."""
    yielded: int = 0
    """Number of times the plan shrank for others and has not grown again since."""
    yielded_to: Pressure = "normal"
    """Worst pressure that it shrank for."""
    yielded_swap: int | None = None
    """Bytes of swap in use when it last shrank for the machine."""

    def see(
        self, plan: MemoryPlan, reading: MemoryReading, *, least_rows: int, may_checkpoint: bool
    ) -> tuple[MemoryPlan, str] | None:
        """Return the next plan and the reason for it, or None if the plan stays.

        least_rows: minimum number of rows decoded at once, those of one tree.
        """
        limit = plan.limit_bytes
        tight, scarce = _near_limit(plan, reading), _scarce(reading.machine)
        if tight or scarce:
            self.calm = 0
            if not tight and not self._yields(plan, reading):
                return None
            over = limit is not None and reading.peak_bytes > limit
            return _less(plan, tight or scarce or "", least_rows, may_checkpoint, over=over)
        self.calm = self.calm + 1 if limit is None or reading.peak_bytes < ROOM * limit else 0
        if self.calm < CALM_STEPS or _rows(plan) == _rows(self.most):
            return None
        self.calm = 0
        self.yielded = max(0, self.yielded - 1)
        if not self.yielded:
            self.yielded_to = "normal"
        return self._more(plan), f"{CALM_STEPS} steps with room to spare"

    def _yields(self, plan: MemoryPlan, reading: MemoryReading) -> bool:
        """Decide if the plan shrinks for the machine's shortage, and remember that it does.

        It always does if this process holds much; else `YIELDS` times, and once more whenever the
        pressure or swap gets worse: shrinking at every step would end at one row and help nobody.
        """
        limit, machine = plan.limit_bytes, reading.machine
        ours = limit is None or reading.peak_bytes > OURS * limit
        pressure = machine.pressure or "normal"
        worse = LEVELS.index(pressure) > LEVELS.index(self.yielded_to)
        if not (ours or worse or self.yielded < YIELDS or self._swapped(machine)):
            return False
        self.yielded += not ours
        self.yielded_to = pressure if worse else self.yielded_to
        self.yielded_swap = machine.swap_used_bytes
        return True

    def _swapped(self, machine: Machine) -> bool:
        """Return True if swap has grown noticeably since the plan last shrank for others."""
        before, now, total = self.yielded_swap, machine.swap_used_bytes, machine.total_bytes
        if before is None or now is None or total is None:
            return False
        return now - before > SWAPPED * total

    def _more(self, plan: MemoryPlan) -> MemoryPlan:
        grown = {
            name: min(most, max(now + 1, int(LARGER * now)))
            for (name, now), most in zip(
                _rows(plan).items(), _rows(self.most).values(), strict=True
            )
        }
        return replace(plan, **grown)


def for_longer(
    request: PlanRequest, plan: MemoryPlan, tokens: int, coefficients: Coefficients
) -> tuple[PlanRequest, MemoryPlan]:
    """Adapt request and plan to prompts with more tokens than the plan assumed.

    Group size and length stay; there are as many rows as fit, but no more than now.
    """
    prompts = PromptLength(tokens, "as seen in training")
    wish = replace(request.plan, max_prompt_tokens=tokens)
    request = replace(request, plan=wish, prompts=prompts)
    longer = replace(plan, max_prompt_tokens=tokens)
    found = refit(request, longer, coefficients, must_fit=False)
    rows = {name: min(now, getattr(found, name)) for name, now in _rows(plan).items()}
    recompute = found.grad_checkpoint or plan.grad_checkpoint
    return request, replace(found, **rows, grad_checkpoint=recompute)


def smaller(plan: MemoryPlan, *, least_rows: int) -> MemoryPlan:
    """Make batches 20 % smaller; a step computes the same result except for rounding.

    least_rows: minimum number of rows decoded at once, those of one tree.
    """
    rows = max(int(SMALLER * plan.decode_rows), least_rows, 1)
    return replace(
        plan,
        decode_rows=min(plan.decode_rows, rows),
        prefill_rows=max(1, int(SMALLER * plan.prefill_rows)),
        micro_rows=max(1, int(SMALLER * plan.micro_rows)),
        head_chunk=max(1, int(SMALLER * plan.head_chunk)),
    )


def shrink_plan(plan: MemoryPlan, *, least_rows: int, may_checkpoint: bool) -> MemoryPlan | None:
    """Return a plan that takes less memory and computes the same, or None if there is none."""
    floor = {
        "decode_rows": max(1, least_rows),
        "prefill_rows": 1,
        "micro_rows": 1,
        "head_chunk": LEAST_CHUNK,
    }
    less = smaller(plan, least_rows=least_rows)
    rows = {
        name: max(now, min(floor[name], getattr(plan, name))) for name, now in _rows(less).items()
    }
    less = replace(less, **rows)
    if plan.micro_rows == 1 and may_checkpoint:
        less = replace(less, grad_checkpoint=True)
    return None if less == plan else less


def _less(
    plan: MemoryPlan, why: str, least_rows: int, may_checkpoint: bool, *, over: bool
) -> tuple[MemoryPlan, str] | None:
    less = shrink_plan(plan, least_rows=least_rows, may_checkpoint=may_checkpoint)
    if less is not None:
        return less, why
    length = int(SMALLER * plan.max_completion_tokens)
    if not over or length < LEAST_LENGTH:
        return None
    note = f"{why}, and batches cannot shrink further: completions now end at {length} tokens"
    return replace(plan, max_completion_tokens=length), note


def _near_limit(plan: MemoryPlan, reading: MemoryReading) -> str | None:
    """Describe how close the step came to the plan's limit, or return None if it did not."""
    limit = plan.limit_bytes
    if limit is None or reading.peak_bytes + reading.cached_bytes <= NEAR * limit:
        return None
    held = f"a peak of {show(reading.peak_bytes)} and {show(reading.cached_bytes)} of freed"
    return f"{held} buffers, close to the limit of {show(limit)}"


def _scarce(machine: Machine) -> str | None:
    """Describe the machine's shortage of memory, or return None if there is none."""
    if machine.pressure in ("warn", "critical"):
        return f"the system's memory pressure is {machine.pressure}"
    free, total = machine.available_bytes, machine.total_bytes
    if free is not None and total is not None and free < SPARE * total:
        return f"only {show(free)} of this machine's {show(total)} is available"
    return None


def _rows(plan: MemoryPlan) -> dict[str, int]:
    names = ("decode_rows", "prefill_rows", "micro_rows", "head_chunk")
    return {name: getattr(plan, name) for name in names}
