"""How many bytes a run takes at most: the peak of MLX's active memory, before anything is loaded.

Rollouts and update do not overlap, so the peak is the larger of the two, above what always stays:

    peak = a + max(rollout, update)
    update = b T + c T^2 + head

a: weights, adapters and their Adam moments, read from shapes. T: positions of a backward pass; its
quadratic term is attention that keeps its scores. What prefill and update take is the engine's to
say (`EngineMemory`). Its constants are fits to measurements on the CPU (`benchmarks/memory.md`);
two short passes replace them by those of the machine and the model at hand (`Coefficients`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from localrl.memory.sizes import Sizes, kv_bytes, lora_parameters, weight_bytes
from localrl.records import MemoryPlan

LOGIT_COPIES = 6.5
"""Arrays as large as a row's logits while a token is drawn."""
OTHER = 2 * 2**20
"""Random numbers, indices, masks of a small batch."""


class EngineMemory(Protocol):
    """What an engine takes beside weights, adapters and caches, from sizes alone."""

    @property
    def name(self) -> str:
        """As `model.engine` has it."""
        ...

    @property
    def counted(self) -> bool:
        """Whether it is counted array by array, so that measuring would tell nothing new."""
        ...

    @property
    def cache_step(self) -> int:
        """Tokens by which caches grow."""
        ...

    def computes(self, sizes: Sizes, float_bytes: int, *, dense: bool) -> bool:
        """Whether it computes such a model."""
        ...

    def key(self, sizes: Sizes) -> list[Any]:
        """Which of its formulas these sizes meet: measured constants hold for one."""
        ...

    def kept_bytes(self, sizes: Sizes) -> int | None:
        """Kept of one position for the way back; None where it need not bound the batch."""
        ...

    def decode_weights(self, sizes: Sizes) -> int:
        """Bytes of a copy of weights for decoding."""
        ...

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Bytes above the keys and values, while so many prompts are prefilled."""
        ...

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, with their square, and of the head's chunks."""
        ...


@dataclass(frozen=True)
class Workload:
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
    engines: tuple[EngineMemory, ...]
    """Those that may compute the model, the preferred one first."""
    trains: bool = True

    def engine(self, sizes: Sizes, *, dense: bool) -> EngineMemory:
        """The one that computes such a model. dense: its weights are unpacked."""
        able = (e for e in self.engines if e.computes(sizes, self.float_bytes, dense=dense))
        return next(able, self.engines[-1])


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
    sizes: Sizes, workload: Workload, plan: MemoryPlan, coefficients: Coefficients = PRIORS
) -> Estimate:
    """Bytes of a run with this plan, for prompts and completions as long as it allows."""
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
        adapters=3 * adapter,
        loading=2 * sizes.vocabulary * sizes.width if on_cpu else 0,
        merged=engine.decode_weights(sizes),
        prompts=prompts,
        caches=caches,
        drawing=drawing,
        linear=linear,
        quadratic=quadratic,
        head=head,
        gradients=2 * adapter,
        optimizer=5 * adapter if workload.trains else 0,
    )


def paths_at_once(workload: Workload, plan: MemoryPlan) -> int:
    """Completions in one backward pass: a tree is not cut."""
    least = workload.leaves if workload.forks else 1
    return max(least, min(plan.micro_rows, workload.prompts * plan.group_size))


def _rollout(sizes: Sizes, workload: Workload, plan: MemoryPlan) -> tuple[int, int, int]:
    """Prompts' caches, completions' caches, and drawing or prefilling."""
    length = plan.max_prompt_tokens + plan.max_completion_tokens
    read = length if workload.turns else plan.max_prompt_tokens
    rows = min(plan.decode_rows, max(workload.prompts * plan.group_size, workload.evaluated))
    prefilled = min(plan.prefill_rows, rows, max(workload.prompts, workload.evaluated))
    engine = workload.engine(sizes, dense=plan.dequantise)
    prompt = kv_bytes(
        sizes, read, bytes_per_number=workload.float_bytes, step=engine.cache_step, prompt=read
    )
    row = kv_bytes(sizes, length, bytes_per_number=workload.float_bytes, step=engine.cache_step)
    growth = 1 + 1 / sizes.layers  # a block's cache exists twice while it grows
    logits = LOGIT_COPIES * 4 * rows * sizes.vocabulary
    prefill = engine.prefill(sizes, workload, prompts=prefilled, length=read)
    return prefilled * prompt, round(rows * row * growth), round(max(logits, prefill))


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
