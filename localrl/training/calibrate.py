"""Calibrates the memory model with two short update passes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from localrl.backend import mx
from localrl.learning.gradient import GradientPass
from localrl.memory.calibration import Probe, key_of, remember, solve
from localrl.memory.estimate import Coefficients, paths_at_once
from localrl.memory.plan import PlanRequest, fit, refit
from localrl.records import Batch, BatchNode, MemoryPlan

DIVISORS = (4, 2)
"""Divisors of the longest prompt and completion that give the lengths of the two probes."""
LEAST_LENGTH, MOST_LENGTH = 8, 1024


def calibrate_plan(
    gradient: GradientPass,
    request: PlanRequest,
    plan: MemoryPlan,
    warn: Callable[[str], None],
    *,
    anew: bool,
) -> MemoryPlan:
    """Measure this machine and model, store the constants for next time, and return a revised plan.

    anew: if True, the group size and the completion length may change too.

    Raises: MemoryBudgetError if not even the smallest batches fit.
    """
    coefficients = measure(gradient, request, plan)
    if coefficients is None:
        warn("two short passes took memory that no constants explain; the plan uses priors instead")
        return plan
    problem = remember(
        key_of(request.sizes, request.workloads[plan.group_size], plan), coefficients
    )
    if problem:
        warn(f"could not store the measured memory constants: {problem}")
    if not anew:
        return refit(request, plan, coefficients)
    found = fit(request, coefficients)
    # The base is already loaded, packed or unpacked; that cannot change now.
    return replace(found, dequantise=plan.dequantise)


def measure(gradient: GradientPass, request: PlanRequest, plan: MemoryPlan) -> Coefficients | None:
    """Return coefficients solved from gradients of the planned number of rows, at two lengths."""
    return solve([probe(gradient, request, shorter(plan, divisor)) for divisor in DIVISORS])


def shorter(plan: MemoryPlan, divisor: int) -> MemoryPlan:
    """Return the plan with its lengths and head chunk divided; the number of chunks stays."""
    lengths = {
        name: min(MOST_LENGTH, max(LEAST_LENGTH, getattr(plan, name) // divisor))
        for name in ("max_prompt_tokens", "max_completion_tokens")
    }
    return replace(plan, **lengths, head_chunk=max(1, plan.head_chunk // divisor))


def probe(gradient: GradientPass, request: PlanRequest, plan: MemoryPlan) -> Probe:
    """Measure the peak of one gradient of the plan's sizes."""
    batch = probe_batch(
        paths_at_once(request.workloads[plan.group_size], plan), plan, request.sizes.vocabulary
    )
    gradient(batch, plan)  # decides how the family is scored, and warms up
    shared, gradient.shared = gradient.shared, bool(gradient.shared)
    try:
        peak = peak_of(lambda: gradient(batch, plan))
        return Probe(request.estimate(plan), peak)
    finally:
        gradient.shared = None if shared else shared


def peak_of(work: Callable[[], object]) -> int:
    """Return the peak bytes that MLX held during the work, above what it held before."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - before


def probe_batch(paths: int, plan: MemoryPlan, vocabulary: int) -> Batch:
    """Make a batch of `paths` completions of the planned length; token values do not matter."""
    length, size = plan.max_completion_tokens, plan.group_size
    tokens = (np.arange(length) * 7919 + 1) % vocabulary
    ones = np.ones(length, np.float32)
    nodes = [
        BatchNode(n // size, -1, tokens.astype(np.int32), ones, -ones, True, 0 * ones)
        for n in range(paths)
    ]
    prompts = ((1,) * plan.max_prompt_tokens,) * (nodes[-1].prompt + 1)
    return Batch(prompts, tuple(nodes), float(paths * length))
