"""The plan: how large the batches may be. Plain integers for everyone else."""

from __future__ import annotations

from dataclasses import replace

from localrl.config import RunConfig
from localrl.memory.machine import available_bytes
from localrl.records import MemoryPlan

LOGIT_BYTES = 64 * 2**20
"""Logits of one head chunk, in float32."""
SMALLER = 0.8
"""What is left of a plan after a death that may have been for memory."""
MICRO_TOKENS = 4096
"""Tokens of one backward pass, when the user does not say."""
DENSE_SHARE = 0.4
"""Share of the available memory that a float32 copy of the base may take."""


def make_plan(
    config: RunConfig, *, vocabulary: int, dense_bytes: int, on_cpu: bool, threads: int | None
) -> MemoryPlan:
    """The sizes that the configuration asks for, the others by rule of thumb.

    `dense_bytes` is what the base would take as float32 matrices. Nothing is estimated or limited
    here: `predicted_bytes` and `limit_bytes` are None.
    """
    rollout, memory = config.rollout, config.memory
    longest = rollout.max_prompt_tokens + rollout.max_completion_tokens
    dequantise, reason = _dequantise(memory.dequantise, dense_bytes, on_cpu)
    return MemoryPlan(
        group_size=rollout.completions,
        decode_rows=memory.decode_rows or rollout.prompts_per_step * rollout.completions,
        micro_rows=memory.micro_rows or max(1, MICRO_TOKENS // longest),
        head_chunk=memory.head_chunk or max(16, LOGIT_BYTES // (4 * vocabulary)),
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_completion_tokens=rollout.max_completion_tokens,
        grad_checkpoint=False,
        dequantise=dequantise,
        threads=threads,
        predicted_bytes=None,
        limit_bytes=None,
        reason=reason,
    )


def smaller(plan: MemoryPlan, *, least_rows: int) -> MemoryPlan:
    """The plan with batches 20 % smaller; what a step computes stays the same but for rounding.

    least_rows: how many rows must be decoded at once, those of one tree.
    """
    rows = max(int(SMALLER * plan.decode_rows), least_rows, 1)
    return replace(
        plan,
        decode_rows=min(plan.decode_rows, rows),
        micro_rows=max(1, int(SMALLER * plan.micro_rows)),
        head_chunk=max(1, int(SMALLER * plan.head_chunk)),
    )


def _dequantise(wish: str, dense_bytes: int, on_cpu: bool) -> tuple[bool, str]:
    if wish != "auto":
        return wish == "on", f"memory.dequantise is {wish}"
    if not on_cpu:
        return False, "the GPU multiplies quantised weights as they are"
    free = available_bytes()
    if free is None:
        return False, "the available memory is unknown, so the base stays quantised"
    fits = dense_bytes <= DENSE_SHARE * free
    sizes = f"float32 base {dense_bytes / 2**20:.0f} MiB, available {free / 2**20:.0f} MiB"
    return fits, f"{sizes}: {'dequantised for speed' if fits else 'stays quantised'}"
