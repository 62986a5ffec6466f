"""How many bytes a run takes at most: the peak of MLX's active memory, before anything is loaded.

Rollouts and update do not overlap, so the peak is the larger of the two, above what always stays:

    peak = a + max(rollout, update)
    update = b T + c T^2 + head

a: weights, adapters and their Adam moments, read from shapes. T: positions of a backward pass; its
quadratic term is unfused attention, which keeps the scores of every block; where NumPy computes the
model, `array_estimate` stands for the update. The constants are fits to measurements on the CPU
backend (`benchmarks/memory.md`); two short passes replace them by those of the machine and the
model at hand (`Coefficients`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from localrl.memory.array_estimate import (
    Extent,
    fits,
    merged_bytes,
    prefill_bytes,
    update_bytes,
)
from localrl.memory.sizes import NONE, Sizes, kv_bytes, lora_parameters, weight_bytes
from localrl.records import MemoryPlan

CACHE_STEP = 64
"""Tokens by which caches grow: `policy.model.CACHE_STEP`."""

# Numbers kept for the backward pass, by position and block, for each number of the block's width,
# of its queries, keys (values), feed-forward layer and adapters.
WIDTH, QUERIES, KEYS, FEED_FORWARD, RANK = 1.5, 4.0, 3.0, 4.7, 1.0
ADAPTED = 7
"""Linear layers of a block, each with one adapter."""
ANCESTORS = 0.8
"""Copies of the ancestors' keys and values that a path keeps in each block."""
SCORES, ONE_BLOCK_SCORES = 1.0, 1.5
"""Copies of a block's attention scores kept by every block; and more of the block at work."""
ONE_BLOCK = 17.0
"""States of all positions, in widths, that the block at work holds beside what is kept."""
PREFILL_SCORES, PREFILL_STATES = 3.0, 17.0
"""The same while prompts are prefilled, where nothing is kept."""
LOGIT_COPIES = 6.5
"""Arrays as large as a row's logits while a token is drawn."""
HEAD_FIRST, HEAD_MORE, HEAD_MOST = 1.2, 0.7, 8.5
"""Arrays as large as a chunk's logits: with one chunk, for each further one, and the most. Chunks
follow each other, but the backend runs ahead of what it computes."""
GATES = {"gemma": 1.3, "qwen3": 1.0, "llama": 0.94, "qwen2": 0.94, "smollm3": 0.94}
"""Families whose blocks keep more or less than Qwen3's: other norms and gates."""
UNKNOWN_GATE = 1.2
"""Of a family that was not measured: rather too much."""
OTHER = 2 * 2**20
"""Random numbers, indices, masks of a small batch."""


@dataclass(frozen=True)
class Job:
    """What a run asks of the memory, beside the sizes in its plan."""

    prompts: int
    """Distinct prompts of a step."""
    evaluated: int
    """Held-out prompts."""
    leaves: int
    """The most completions of a prompt at once."""
    forks: bool
    """Trees: their leaves are decoded and scored together."""
    turns: bool
    """Completions of several turns: each turn reads its path again."""
    rank: int
    lora_layers: int
    lora_keys: tuple[str, ...]
    float_bytes: int
    """Of an activation: 4 on the CPU, where everything is float32."""
    trains: bool = True
    arrays: bool | None = None
    """Whether NumPy computes the model; None: not looked at yet."""


@dataclass(frozen=True)
class Coefficients:
    """What measurements make of the priors: factors on them. All 1: nothing was measured."""

    linear: float = 1.0
    """b: on what grows with the positions of a backward pass."""
    quadratic: float = 1.0
    """c: on what grows with their square."""
    head: float = 1.0
    """On the logits of the head's chunks."""
    measured: bool = False


PRIORS = Coefficients()


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parts of a run, each at its worst."""

    weights: int
    adapters: int
    """Adapters with their two moments."""
    loading: int
    """Above the weights: the largest matrix as it is stored, while it becomes float32."""
    prompts: int
    """Keys and values of the prompts."""
    caches: int
    """Keys and values of the completions, with their growth."""
    drawing: int
    """Logits and what is drawn from them, or the prefill of prompts, whichever is more."""
    linear: int
    quadratic: int
    head: int
    gradients: int
    """Sums of gradients beside those of a micro-batch."""
    optimizer: int
    """Gradients and the adapters and moments before and after, when they change."""
    merged: int = 0
    """A copy of the weights with the adapters in it, to decode with."""

    @property
    def stays(self) -> int:
        """a: what is there all the time."""
        return self.weights + self.adapters + OTHER

    @property
    def rollout(self) -> int:
        """While completions are decoded, above what stays."""
        return self.merged + self.prompts + self.caches + self.drawing

    @property
    def update(self) -> int:
        """While the adapters learn, above what stays."""
        return max(self.linear + self.quadratic + self.head + self.gradients, self.optimizer)

    @property
    def peak(self) -> int:
        """The most of all."""
        return self.stays + max(self.loading, self.rollout, self.update)


def estimate(
    sizes: Sizes, job: Job, plan: MemoryPlan, coefficients: Coefficients = PRIORS
) -> Estimate:
    """Bytes of a run with this plan, for prompts and completions as long as it allows."""
    on_cpu = job.float_bytes == 4
    weights = weight_bytes(sizes, float32=on_cpu, dense=plan.dequantise)
    adapter = 4 * lora_parameters(sizes, job.rank, job.lora_layers, job.lora_keys)
    prompts, caches, drawing = _rollout(sizes, job, plan)
    linear, quadratic, head = _update(sizes, job, plan, coefficients) if job.trains else (0, 0, 0)
    return Estimate(
        weights=weights,
        adapters=3 * adapter,
        loading=2 * sizes.vocabulary * sizes.width if on_cpu else 0,
        merged=merged_bytes(sizes) if in_arrays(sizes, job, plan) else 0,
        prompts=prompts,
        caches=caches,
        drawing=drawing,
        linear=linear,
        quadratic=quadratic,
        head=head,
        gradients=2 * adapter,
        optimizer=5 * adapter if job.trains else 0,
    )


def paths_at_once(job: Job, plan: MemoryPlan) -> int:
    """Completions in one backward pass: a tree is not cut."""
    least = job.leaves if job.forks else 1
    return max(least, min(plan.micro_rows, job.prompts * plan.group_size))


def _rollout(sizes: Sizes, job: Job, plan: MemoryPlan) -> tuple[int, int, int]:
    """Prompts' caches, completions' caches, and drawing or prefilling."""
    length = plan.max_prompt_tokens + plan.max_completion_tokens
    read = length if job.turns else plan.max_prompt_tokens
    rows = min(plan.decode_rows, max(job.prompts * plan.group_size, job.evaluated))
    prefilled = min(plan.prefill_rows, rows, max(job.prompts, job.evaluated))
    prompt = kv_bytes(sizes, read, bytes_per_number=job.float_bytes, step=CACHE_STEP, prompt=read)
    row = kv_bytes(sizes, length, bytes_per_number=job.float_bytes, step=CACHE_STEP)
    growth = 1 + 1 / sizes.layers  # a block's cache exists twice while it grows
    logits = LOGIT_COPIES * 4 * rows * sizes.vocabulary
    if in_arrays(sizes, job, plan):
        prefill = prefill_bytes(
            sizes, Extent(prefilled * read, prefilled * read, 0, prefilled, read, read)
        )
    else:
        scores = PREFILL_SCORES * sizes.heads * read * read
        states = PREFILL_STATES * read * sizes.width
        prefill = job.float_bytes * prefilled * (scores + states)
    return prefilled * prompt, round(rows * row * growth), round(max(logits, prefill))


def _update(
    sizes: Sizes, job: Job, plan: MemoryPlan, coefficients: Coefficients
) -> tuple[int, int, int]:
    """What grows with positions, with their square, and the head's chunks."""
    if in_arrays(sizes, job, plan):
        parts = _array_update(sizes, job, plan)
        factors = coefficients.linear, coefficients.quadratic, coefficients.head
        linear, quadratic, head = (f * part for f, part in zip(factors, parts, strict=True))
        return round(linear), round(quadratic), round(head)
    paths, rows = paths_at_once(job, plan), NONE in sizes.windows
    length = plan.max_prompt_tokens + plan.max_completion_tokens
    if rows:  # families that do not share prompts
        positions, pairs = paths * length, paths * length**2
        copied = 0
    else:
        prompt = plan.max_prompt_tokens
        trees = math.ceil(paths / max(1, plan.group_size))
        positions = trees * prompt + paths * plan.max_completion_tokens
        pairs = trees * prompt**2 + paths * plan.max_completion_tokens * length
        copied = paths * prompt * 2 * sizes.kv_heads * sizes.head_dim
    one = _kept(sizes, job.rank) * positions + ANCESTORS * copied
    states = positions * sizes.width
    attending = sum(window != NONE for window in sizes.windows)
    scores = pairs * sizes.heads
    if plan.grad_checkpoint:
        kept, blocks = sizes.layers * states + 2 * sizes.layers * positions * _keys(sizes), 1
    else:
        kept, blocks = 0.0, sizes.layers
    # The head's logits are gone when the gradients of a block come, and with them what that takes.
    linear = kept + blocks * one + ONE_BLOCK * states
    quadratic = (SCORES * min(blocks, attending) + ONE_BLOCK_SCORES) * scores
    targets = paths * plan.max_completion_tokens
    work = ONE_BLOCK * states + ONE_BLOCK_SCORES * scores
    if plan.grad_checkpoint:
        work += one + SCORES * scores
    head = head_bytes(plan.head_chunk, targets, sizes.vocabulary) - job.float_bytes * work
    return (
        round(coefficients.linear * job.float_bytes * linear),
        round(coefficients.quadratic * job.float_bytes * quadratic),
        round(coefficients.head * max(0.0, head)),
    )


def in_arrays(sizes: Sizes, job: Job, plan: MemoryPlan) -> bool:
    """Whether NumPy computes the model: as it was found, or as its sizes let expect."""
    if job.arrays is not None:
        return job.arrays
    return fits(sizes, float_bytes=job.float_bytes, dense=plan.dequantise)


def _array_update(sizes: Sizes, job: Job, plan: MemoryPlan) -> tuple[float, float, float]:
    paths = paths_at_once(job, plan)
    prompt, own = plan.max_prompt_tokens, plan.max_completion_tokens
    trees = math.ceil(paths / max(1, plan.group_size))
    prompts, paths_own = trees * prompt, paths * own
    extent = Extent(
        prompts + paths_own,
        max(prompts, paths_own),
        paths * prompt,
        paths,
        own,
        prompt + own,
    )
    chunk = max(1, min(plan.head_chunk, paths * own))
    return update_bytes(sizes, extent, 4 * chunk * sizes.vocabulary, recompute=plan.grad_checkpoint)


def head_bytes(chunk: int, targets: int, vocabulary: int) -> int:
    """Logits of a head chunk, in float32, and what is made of them."""
    chunk = max(1, min(chunk, targets))
    copies = min(HEAD_MOST, HEAD_FIRST + HEAD_MORE * math.ceil(targets / chunk))
    return round(copies * 4 * chunk * vocabulary)


def _kept(sizes: Sizes, rank: int) -> float:
    """Numbers kept by one block for a position."""
    gate = next((g for family, g in GATES.items() if sizes.family.startswith(family)), UNKNOWN_GATE)
    queries = sizes.heads * sizes.head_dim
    mine = WIDTH * sizes.width + QUERIES * queries + KEYS * _keys(sizes)
    return gate * (mine + FEED_FORWARD * sizes.ffn) + RANK * ADAPTED * rank


def _keys(sizes: Sizes) -> int:
    return sizes.kv_heads * sizes.head_dim


def told(found: Estimate) -> Iterator[tuple[str, int]]:
    """The parts with the names that people see, largest phase last."""
    yield "weights", found.weights
    yield "adapters and Adam", found.adapters
    yield "rollouts: weights with adapters", found.merged
    yield "rollouts: caches of prompts", found.prompts
    yield "rollouts: caches of completions", found.caches
    yield "rollouts: drawing, prefill", found.drawing
    yield "update: activations", found.linear
    yield "update: attention scores", found.quadratic
    yield "update: logits", found.head
    yield "update: gradients", found.gradients
