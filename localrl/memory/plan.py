"""The memory plan: batch sizes that fit the limit, as plain integers for all other modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace

from localrl.config import RunConfig
from localrl.errors import MemoryBudgetError
from localrl.memory.estimate import PRIORS, Coefficients, Estimate, Workload, estimate
from localrl.memory.limit import Limit, show, write_limit
from localrl.memory.sizes import Sizes
from localrl.records import MemoryPlan

LOGIT_BYTES = 32 * 2**20
"""Bytes of a head chunk's float32 logits: a larger vocabulary means fewer positions per chunk."""
LEAST_CHUNK, LEAST_LENGTH = 16, 16
"""Minimum positions of a chunk, and minimum tokens of a completion, in any plan."""
MICRO_TOKENS = 4096
"""Default number of tokens in one backward pass."""
KEPT_ON_CPU = 256 * 2**20
"""Bytes kept by such a pass on a CPU, where matrix products gain nothing from more columns."""
CACHED, CACHED_ON_CPU = 0.05, 32 * 2**20
"""Fraction of the limit for freed buffers that MLX keeps; on the CPU at most these bytes, MLX's
default there."""
MEASURED_SHARE, PRIOR_SHARE = 0.85, 0.75
"""Fraction of the limit that the predicted peak may take. The rest is for freed buffers and for
prediction errors: 10 % if the peak is counted or measured, more while it rests on priors."""
TIGHT_SHARE = 0.95
"""The same for the fewest rows, which the priors predicted to fit: the rest is freed buffers."""


@dataclass(frozen=True)
class PromptLength:
    """The longest prompt that is planned for, and the source of that number."""

    tokens: int
    basis: str
    """Source in words, printed after "prompts of up to N tokens, "."""

    def __str__(self) -> str:
        return f"prompts of up to {self.tokens} tokens, {self.basis}"


@dataclass(frozen=True)
class PlanRequest:
    """The plan a run wants, and the constraints on it."""

    plan: MemoryPlan
    """The sizes if memory were unlimited."""
    sizes: Sizes
    workloads: Mapping[int, Workload]
    """Workloads by group size: the wanted one first, then smaller ones the strategy allows."""
    limit: Limit
    may_checkpoint: bool = True
    prompts: PromptLength | None = None
    """Longest prompt; None if only the configured maximum is known."""

    def estimate(self, plan: MemoryPlan, coefficients: Coefficients = PRIORS) -> Estimate:
        """Estimate the bytes of this plan."""
        return estimate(self.sizes, self.workloads[plan.group_size], plan, coefficients)

    def needed(self, plan: MemoryPlan, coefficients: Coefficients = PRIORS) -> int:
        """Smallest limit for MLX's memory that admits this plan."""
        peak = self.estimate(plan, coefficients).peak
        return -int(-peak // self.share(plan, coefficients)) + 1

    def counted(self, plan: MemoryPlan) -> bool:
        """Return True if the engine used with this plan counts its memory array by array."""
        engine = self.workloads[plan.group_size].engine(self.sizes, dense=plan.dequantise)
        return engine.counted

    def share(self, plan: MemoryPlan, coefficients: Coefficients) -> float:
        """Fraction of the limit that this plan's predicted peak may take."""
        sure = coefficients.measured or self.counted(plan)
        return MEASURED_SHARE if sure else PRIOR_SHARE


def initial_plan(
    config: RunConfig,
    *,
    vocabulary: int,
    on_cpu: bool,
    threads: int | None,
    prompt_tokens: int | None = None,
    kept: int | None = None,
) -> MemoryPlan:
    """Build the plan from the configured sizes, with rules of thumb for the others.

    prompt_tokens: tokens of the longest prompt; None: the configured maximum. kept: bytes kept per
    position in a backward pass on a CPU, if known.
    """
    rollout, memory = config.rollout, config.memory
    prompt_tokens = prompt_tokens or rollout.max_prompt_tokens
    # Each prompt is computed once for its whole group.
    each = rollout.max_completion_tokens + prompt_tokens / rollout.completions
    paths = rollout.prompts_per_step * rollout.completions  # with more rows, cuts would do nothing
    rows = memory.decode_rows or paths
    micro_tokens = min(MICRO_TOKENS, KEPT_ON_CPU // kept) if kept else MICRO_TOKENS
    most = max(1, min(paths, int(micro_tokens / each)))
    micro_rows = memory.micro_rows or _whole_groups(most, rollout.completions)
    chunk = min(LOGIT_BYTES // (4 * vocabulary), micro_rows * rollout.max_completion_tokens)
    return MemoryPlan(
        group_size=rollout.completions,
        decode_rows=rows,
        prefill_rows=rows,
        micro_rows=micro_rows,
        head_chunk=memory.head_chunk or max(1, chunk),
        max_prompt_tokens=prompt_tokens,
        max_completion_tokens=rollout.max_completion_tokens,
        grad_checkpoint=False,
        dequantise=memory.dequantise == "on" or (memory.dequantise == "auto" and on_cpu),
        threads=threads,
        predicted_bytes=None,
        limit_bytes=None,
        reason="",
    )


def _whole_groups(most: int, completions: int) -> int:
    """Return `most` rows rounded down to whole groups; up, to one group, from half of one on.

    A pass computes each of its prompts once, a group in two passes its prompt twice.
    """
    if most < completions <= 2 * most:
        return completions
    return most - most % completions or most


def fit(request: PlanRequest, coefficients: Coefficients = PRIORS) -> MemoryPlan:
    """Return the wanted plan, reduced as far as needed to fit the limit.

    It is reduced in this order, and only if that helps: rows of a backward pass, the head's chunk,
    gradient checkpointing, prompts prefilled and rows decoded at once, dequantised weights, the
    group size, the length of completions. Reductions that turn out unnecessary are then undone.

    Raises: MemoryBudgetError if nothing fits; the message gives a sufficient limit.
    """
    if request.limit.bytes is None:
        return _unlimited(request, coefficients)
    room = _Room(request, coefficients, request.limit.bytes)
    plan = request.plan
    for reduce in (_update, _rollout, _dense, _group, _length):
        if room.fits(plan):
            break
        plan = reduce(plan, room)
    if not room.fits(plan):
        raise _refusal(request, plan, coefficients)
    return _finished(_take_back(plan, room), request, coefficients)


def refit(
    request: PlanRequest, plan: MemoryPlan, coefficients: Coefficients, *, must_fit: bool = True
) -> MemoryPlan:
    """Adapt the plan after a measurement: new numbers of rows, same group size and length.

    must_fit: if False, the fewest rows are used even if they are predicted not to fit.

    Raises: MemoryBudgetError if not even the fewest rows fit.
    """
    kept = {
        "group_size": plan.group_size,
        "max_completion_tokens": plan.max_completion_tokens,
        "dequantise": plan.dequantise,
    }
    workloads = {plan.group_size: request.workloads[plan.group_size]}
    same = replace(request, plan=replace(request.plan, **kept), workloads=workloads)
    found = None
    with suppress(MemoryBudgetError):
        found = fit(same, coefficients)
    if found is None or kept.keys() & changes(found, same.plan).keys():
        found, limit = _finished(_smallest(same), same, coefficients), request.limit.bytes or 0
        if must_fit and (found.predicted_bytes or 0) > TIGHT_SHARE * limit:
            # Under the limit that the message gives, only rows have to be reduced.
            raise _refusal(request, _smallest(request), coefficients)
    return replace(found, reason=_reason(request, found, coefficients))


def cache_bytes(limit: int, *, on_cpu: bool) -> int:
    """Bytes of freed buffers that MLX may keep under a limit."""
    share = int(CACHED * limit)
    return min(share, CACHED_ON_CPU) if on_cpu else share


def changes(before: MemoryPlan, after: MemoryPlan) -> dict[str, tuple[object, object]]:
    """Differences between two plans, ignoring predictions and reasons."""
    told = ("predicted_bytes", "limit_bytes", "reason", "measured")
    pairs = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in fields(before)}
    return {name: pair for name, pair in pairs.items() if name not in told and pair[0] != pair[1]}


@dataclass(frozen=True)
class _Room:
    """The memory available to a plan, and checks against it."""

    request: PlanRequest
    coefficients: Coefficients
    limit: int

    def of(self, plan: MemoryPlan) -> Estimate:
        return self.request.estimate(plan, self.coefficients)

    def bytes(self, plan: MemoryPlan) -> float:
        return self.request.share(plan, self.coefficients) * self.limit

    def fits(self, plan: MemoryPlan) -> bool:
        return self.of(plan).peak <= self.bytes(plan)

    def updates(self, plan: MemoryPlan) -> bool:
        found = self.of(plan)
        return found.stays + found.update <= self.bytes(plan)

    def decodes(self, plan: MemoryPlan) -> bool:
        found = self.of(plan)
        return found.stays + found.rollout <= self.bytes(plan)


Fits = Callable[[MemoryPlan], bool]


def _update(plan: MemoryPlan, room: _Room) -> MemoryPlan:
    """Use fewer rows, a smaller chunk and gradient checkpointing, as far as the update needs."""
    if room.updates(plan):
        return plan
    plan = _most(plan, "micro_rows", 1, room.updates)
    if not room.updates(plan):
        plan = _most(plan, "head_chunk", LEAST_CHUNK, room.updates)
    if not room.updates(plan) and room.request.may_checkpoint:
        plan = replace(plan, grad_checkpoint=True)
    return plan


def _rollout(plan: MemoryPlan, room: _Room) -> MemoryPlan:
    """Prefill fewer prompts and decode fewer rows at once, as far as the rollouts need it."""
    if room.decodes(plan):
        return plan
    plan = _most(plan, "prefill_rows", 1, room.decodes)
    if room.decodes(plan):
        return plan
    return _most(plan, "decode_rows", _least_rows(plan, room.request), room.decodes)


def _dense(plan: MemoryPlan, room: _Room) -> MemoryPlan:
    packed = replace(plan, dequantise=False)
    return packed if room.of(packed).peak < room.of(plan).peak else plan


def _group(plan: MemoryPlan, room: _Room) -> MemoryPlan:
    """Use a smaller group, if its completions are decoded or scored together."""
    best = plan
    for size in room.request.workloads:
        if size < best.group_size and not room.fits(best):
            found = replace(plan, group_size=size)
            rows = max(1, min(plan.decode_rows, _least_rows(found, room.request)))
            found = replace(found, decode_rows=rows)
            if room.of(found).peak < room.of(best).peak:
                best = found
    return best


def _length(plan: MemoryPlan, room: _Room) -> MemoryPlan:
    return _most(plan, "max_completion_tokens", LEAST_LENGTH, room.fits, step=LEAST_LENGTH)


def _take_back(plan: MemoryPlan, room: _Room) -> MemoryPlan:
    """Undo as many reductions of the plan as fit after all."""
    for field, value in (("grad_checkpoint", False), ("dequantise", room.request.plan.dequantise)):
        back = replace(plan, **{field: value})
        if room.fits(back):
            plan = back
    for field in ("decode_rows", "prefill_rows", "micro_rows", "head_chunk"):
        wish = replace(plan, **{field: getattr(room.request.plan, field)})
        plan = _most(wish, field, getattr(plan, field), room.fits)
    return plan


def _most(plan: MemoryPlan, field: str, least: int, fits: Fits, *, step: int = 1) -> MemoryPlan:
    """Set a field to the largest value from `least` to its current one that fits, or to `least`.

    It is found by bisection, since a larger value never takes less memory.
    """
    most = getattr(plan, field)
    if most <= least or fits(plan):
        return plan
    low, high = least // step, -(-most // step)  # high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if fits(replace(plan, **{field: middle * step})) else (low, middle)
        )
    return replace(plan, **{field: max(least, low * step)})


def _smallest(request: PlanRequest) -> MemoryPlan:
    """The plan with the wanted group size and length and the smallest batches."""
    return replace(
        request.plan,
        decode_rows=min(request.plan.decode_rows, _least_rows(request.plan, request)),
        prefill_rows=1,
        micro_rows=1,
        head_chunk=min(request.plan.head_chunk, LEAST_CHUNK),
        grad_checkpoint=request.may_checkpoint,
    )


def _least_rows(plan: MemoryPlan, request: PlanRequest) -> int:
    workload = request.workloads[plan.group_size]
    return workload.leaves if workload.forks else 1


def _unlimited(request: PlanRequest, coefficients: Coefficients) -> MemoryPlan:
    """The plan if no limit is known: the wanted one, without dequantised weights."""
    plan = request.plan
    if request.limit.from_machine and request.sizes.bits:
        plan = replace(plan, dequantise=False)
    return _finished(plan, request, coefficients)


def _finished(plan: MemoryPlan, request: PlanRequest, coefficients: Coefficients) -> MemoryPlan:
    return replace(
        plan,
        predicted_bytes=request.estimate(plan, coefficients).peak,
        limit_bytes=request.limit.bytes,
        measured=coefficients.measured,
        reason=_reason(request, plan, coefficients),
    )


def _reason(request: PlanRequest, plan: MemoryPlan, coefficients: Coefficients) -> str:
    """Explain the plan in one line: predicted peak, its basis, the limit, and reductions."""
    peak = show(request.estimate(plan, coefficients).peak)
    basis = "measured constants" if coefficients.measured else "priors"
    basis = "counted" if request.counted(plan) else f"from {basis}"
    limit = request.limit
    bound = f"limit {show(limit.bytes)} ({limit.reason})" if limit.bytes else limit.reason
    given = ", ".join(_given(request.plan, plan))
    counted = f" for {request.prompts}" if request.prompts else ""
    told = f"predicted peak {peak} {basis}{counted}; {bound}"
    return told + (f"; changed to fit: {given}" if given else "")


def _given(wish: MemoryPlan, plan: MemoryPlan) -> Iterator[str]:
    for name, (was, now) in changes(wish, plan).items():
        if isinstance(was, bool):
            yield f"{name} {'on' if now else 'off'}"
        else:
            yield f"{name} {was} -> {now}"


def _refusal(
    request: PlanRequest, least: MemoryPlan, coefficients: Coefficients
) -> MemoryBudgetError:
    found = request.estimate(least, coefficients)
    limit = request.limit
    needed = request.needed(least, coefficients)
    enough = write_limit(limit.setting(needed))
    packed = "" if request.sizes.bits else "--quantize 4, "
    return MemoryBudgetError(
        f"This run does not fit in memory. MLX's memory is limited to {show(limit.bytes or 0)} "
        f"({limit.reason}). Even with the smallest batches {show(found.peak)} are predicted, "
        f"{show(found.weights)} of them for the weights, and because predictions err, that takes a "
        f"limit of {show(needed)}. The smallest sufficient limit is --memory-limit {enough}, which "
        f"is for the whole process. Or choose {packed}a smaller model, or shorter prompts (now up "
        f"to {least.max_prompt_tokens} tokens)."
    )
