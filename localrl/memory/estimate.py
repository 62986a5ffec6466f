"""An estimate of a run's peak memory (MLX's active memory), made before anything is loaded.

Rollouts and update do not overlap, so the peak is the larger of the two plus the permanent part:

    peak = a + max(rollout, update)
    update = b T + c T^2 + head

a: weights, adapters and their Adam moments, read from shapes. T: positions of a backward pass; the
quadratic term comes from attention that keeps its scores. The engine provides the formulas for
prefill and update (`EngineMemory`). Their constants are fitted to measurements on the CPU
(`benchmarks/memory.md`); two short passes rescale them for the machine and model (`Coefficients`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from localrl.memory.sizes import Sizes, kv_bytes, lora_parameters, weight_bytes
from localrl.records import MemoryPlan

LOGIT_COPIES = 6.5
"""Number of arrays as large as a row's logits while a token is drawn."""
OTHER = 2 * 2**20
"""Bytes of random numbers, indices and masks of a small batch."""


class EngineMemory(Protocol):
    """An engine's memory besides weights, adapters and caches, from sizes alone."""

    @property
    def name(self) -> str:
        """Name of the engine in `model.engine`."""
        ...

    @property
    def counted(self) -> bool:
        """True if memory is counted array by array, so measuring would add nothing."""
        ...

    @property
    def cache_step(self) -> int:
        """Number of tokens by which caches grow."""
        ...

    def computes(self, sizes: Sizes, float_bytes: int, *, dense: bool) -> bool:
        """Return True if the engine computes such a model."""
        ...

    def key(self, sizes: Sizes) -> list[Any]:
        """Key of the formula used for these sizes: measured constants are valid for one formula."""
        ...

    def kept_bytes(self, sizes: Sizes) -> int | None:
        """Bytes kept per position for the backward pass; None if it need not bound the batch."""
        ...

    def decode_weights(self, sizes: Sizes) -> int:
        """Bytes of a copy of the weights made for decoding."""
        ...

    def copies(self, sizes: Sizes, workload: Workload) -> int:
        """Bytes of what it keeps in a format of its own besides the model and its adapters."""
        ...

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Bytes besides the keys and values while `prompts` prompts are prefilled."""
        ...

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, with their square, and with the head's chunks."""
        ...


@dataclass(frozen=True)
class Workload:
    """The properties of a run that its memory depends on, besides the sizes in its plan."""

    prompts: int
    """Number of distinct prompts in a step."""
    evaluated: int
    """Number of held-out prompts."""
    leaves: int
    """Maximum number of completions of a prompt at once."""
    forks: bool
    """True for trees: their leaves are decoded and scored together."""
    turns: bool
    """True for multi-turn completions: each turn prefills its path again."""
    rank: int
    lora_layers: int
    lora_keys: tuple[str, ...]
    float_bytes: int
    """Bytes of one number of an activation: 4 on the CPU, where everything is float32."""
    engines: tuple[EngineMemory, ...]
    """Engines that may compute the model, the preferred one first."""
    trains: bool = True
    reference: bool = False
    """True if the adapters that the run begins with are kept, as the KL's reference."""
    own_prompts: bool = False
    """True if completions of one example may begin with different prompts, as an agent's may."""

    def engine(self, sizes: Sizes, *, dense: bool) -> EngineMemory:
        """Return the engine that computes such a model. dense: its weights are dequantised."""
        able = (e for e in self.engines if e.computes(sizes, self.float_bytes, dense=dense))
        return next(able, self.engines[-1])


@dataclass(frozen=True)
class Coefficients:
    """Measured factors on the priors. All 1: nothing was measured."""

    linear: float = 1.0
    """b: factor on the part that grows with the positions of a backward pass."""
    quadratic: float = 1.0
    """c: factor on the part that grows with their square."""
    head: float = 1.0
    """Factor on the logits of the head's chunks."""
    measured: bool = False


PRIORS = Coefficients()


@dataclass(frozen=True)
class Estimate:
    """Bytes of the parts of a run, each at its peak."""

    weights: int
    adapters: int
    """Adapters with their two Adam moments, and those of the KL's reference."""
    loading: int
    """Extra bytes while loading: the largest matrix as stored, while it is cast to float32."""
    prompts: int
    """Keys and values of the prompts."""
    caches: int
    """Keys and values of the completions, including the copies made when caches grow."""
    drawing: int
    """Logits and arrays for drawing tokens, or the prefill of prompts, whichever is larger."""
    linear: int
    quadratic: int
    head: int
    gradients: int
    """Gradients of earlier micro-batches: at its peak a pass has hardly any of its own."""
    optimizer: int
    """Gradients, and the adapters and moments before and after the optimizer step."""
    merged: int = 0
    """A copy of the weights with the adapters merged in, for decoding."""

    @property
    def stays(self) -> int:
        """The permanent part a."""
        return self.weights + self.adapters + OTHER

    @property
    def rollout(self) -> int:
        """Bytes besides the permanent part while completions are decoded."""
        return self.merged + self.prompts + self.caches + self.drawing

    @property
    def update(self) -> int:
        """Bytes besides the permanent part during the update."""
        return max(self.linear + self.quadratic + self.head + self.gradients, self.optimizer)

    @property
    def peak(self) -> int:
        """Peak of the whole run."""
        return self.stays + max(self.loading, self.rollout, self.update)


def estimate(
    sizes: Sizes, workload: Workload, plan: MemoryPlan, coefficients: Coefficients = PRIORS
) -> Estimate:
    """Estimate the bytes of a run with this plan, for the longest prompts and completions."""
    on_cpu = workload.float_bytes == 4
    weights = weight_bytes(sizes, float32=on_cpu, dense=plan.dequantise)
    adapter = 4 * lora_parameters(sizes, workload.rank, workload.lora_layers, workload.lora_keys)
    prompts, caches, drawing = _rollout(sizes, workload, plan)
    engine = workload.engine(sizes, dense=plan.dequantise)
    parts = engine.update(sizes, workload, plan) if workload.trains else (0, 0, 0)
    factors = coefficients.linear, coefficients.quadratic, coefficients.head
    linear, quadratic, head = (round(f * part) for f, part in zip(factors, parts, strict=True))
    return Estimate(
        weights=weights,
        adapters=(3 + workload.reference) * adapter + engine.copies(sizes, workload),
        loading=_largest(sizes) if on_cpu else 0,
        merged=engine.decode_weights(sizes),
        prompts=prompts,
        caches=caches,
        drawing=drawing,
        linear=linear,
        quadratic=quadratic,
        head=head,
        gradients=adapter * (paths_at_once(workload, plan) < workload.prompts * plan.group_size),
        optimizer=5 * adapter if workload.trains else 0,
    )


def _largest(sizes: Sizes) -> int:
    """Bytes of the largest matrix as stored; 0 if nothing has to be cast."""
    if sizes.float_bytes == 4 and not sizes.bits:
        return 0
    return max(m.bytes(float_bytes=sizes.float_bytes, dense=False) for m in sizes.matrices)


def prompts_at_once(workload: Workload, plan: MemoryPlan) -> int:
    """Number of prompts in one backward pass."""
    each = 1 if workload.own_prompts else max(1, plan.group_size)
    return math.ceil(paths_at_once(workload, plan) / each)


def paths_at_once(workload: Workload, plan: MemoryPlan) -> int:
    """Number of completions in one backward pass: a tree is not split."""
    least = workload.leaves if workload.forks else 1
    return max(least, min(plan.micro_rows, workload.prompts * plan.group_size))


def _rollout(sizes: Sizes, workload: Workload, plan: MemoryPlan) -> tuple[int, int, int]:
    """Bytes of prompt caches, completion caches, and drawing or prefilling."""
    length = plan.max_prompt_tokens + plan.max_completion_tokens
    read = length if workload.turns else plan.max_prompt_tokens
    rows = min(plan.decode_rows, max(workload.prompts * plan.group_size, workload.evaluated))
    prefilled = min(plan.prefill_rows, rows, max(workload.prompts, workload.evaluated))
    engine = workload.engine(sizes, dense=plan.dequantise)
    prompt = kv_bytes(
        sizes, read, bytes_per_number=workload.float_bytes, step=engine.cache_step, prompt=read
    )
    row = kv_bytes(sizes, length, bytes_per_number=workload.float_bytes, step=engine.cache_step)
    growth = 1 + 1 / sizes.layers  # one block's cache exists twice while it grows
    logits = LOGIT_COPIES * 4 * rows * sizes.vocabulary
    prefill = engine.prefill(sizes, workload, prompts=prefilled, length=read)
    return prefilled * prompt, round(rows * row * growth), round(max(logits, prefill))


def told(found: Estimate) -> Iterator[tuple[str, int]]:
    """Yield the parts with the names shown to users."""
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
