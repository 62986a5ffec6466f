"""The update: micro-batches, one gradient sum, one division, one optimizer step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from localrl.backend import mx, nn, optim, tree_flatten, tree_map, tree_unflatten
from localrl.config import LearningConfig
from localrl.distributed.collective import ALONE, Ranks
from localrl.distributed.shard import shard_batch
from localrl.errors import LocalRLError
from localrl.learning.objective import ObjectiveSums, kl_terms, policy_sums
from localrl.learning.objectives import make_objective
from localrl.policy.lora import adapters_off
from localrl.policy.model import Policy
from localrl.policy.packing import MicroBatch, forest_batches, row_batches
from localrl.policy.scoring import forest_agrees
from localrl.policy.size import relative_size, weight_norms
from localrl.records import Batch, MemoryPlan, StepStats

LOGGER = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Consecutive steps with an update that is not finite after which the run ends."""

_State = tuple[Any, int]
"""Adapters and optimizer state, and the number of updates made."""

DRIFT_TOKENS = 128
"""Number of trained tokens on which the policy's drift is measured."""

NO_UPDATE = StepStats(*(None,) * 8, trained_tokens=0, saved_positions=0, updated=False)


class Updater:
    """Applies Adam to the adapters of a policy; nothing else changes them."""

    def __init__(
        self,
        policy: Policy,
        config: LearningConfig,
        temperature: float,
        warn: Callable[[str], None] = LOGGER.warning,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = policy
        self.ranks: Ranks = ALONE
        """The ranks that share each batch."""
        self._beat = beat
        self.shared: bool | None = None
        """True if prompts and nodes are computed once; None until checked on the first batch."""
        self._warn = warn
        self.config = config
        self.objective = make_objective(config)
        self.temperature = temperature
        self._norms: mx.array | None = None
        self.updates = 0
        self.skipped = 0
        """Number of consecutive steps without an update."""
        # Every update sets its own rate.
        self.optimizer = optim.Adam(learning_rate=0.0, bias_correction=True)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update: rises linearly over the warm-up, then is constant."""
        return self.config.lr * min(1.0, (self.updates + 1) / (self.config.warmup_steps + 1))

    def update(self, batch: Batch, plan: MemoryPlan) -> StepStats:
        """Update the adapters on one step's batch; an empty batch changes nothing.

        With several ranks each gets the whole batch, computes its share of it, and applies the same
        update from the sum.

        If the loss, the gradient, an adapter, or a log-probability under the new adapters is not
        finite, the adapters and the optimizer are left or restored as they were.

        Raises: LocalRLError if that happens in several consecutive steps.
        """
        if not any(node.trained.any() for node in batch.nodes):
            return NO_UPDATE
        batch, before = shard_batch(batch, self.ranks.rank, self.ranks.size), self._state()
        first = stats = self._apply(batch, plan)
        for _ in range(self.config.updates_per_step - 1):
            # Repeating a failed update would fail the same way.
            stats = stats if stats.problem else self._apply(batch, plan)
        problem, drift = stats.problem, None
        if first.updated:
            drift = self._drift(batch, plan)
            if not np.isfinite(drift):
                self._put_back(before)
                problem, drift = "log-probabilities after the update were not finite", None
        self._count(problem)
        updated = drift is not None
        size = self._relative_size() if updated else None
        return replace(first, drift=drift, updated=updated, problem=problem, relative_size=size)

    def _relative_size(self) -> float:
        if self._norms is None:
            self._norms = weight_norms(self.policy.model)
        return relative_size(self.policy.model, self._norms)

    def _drift(self, batch: Batch, plan: MemoryPlan) -> float:
        """Mean |log-probability now - at the start of the step| over the tokens of a few prompts.

        One forward pass over a sample: enough trees for `DRIFT_TOKENS` trained tokens.
        """
        moved = np.zeros(2)  # their sum and their number
        for micro in self._micro_batches(_some(batch, DRIFT_TOKENS // self.ranks.size), plan):
            change = np.array(self._logprobs(micro, plan.head_chunk)) - micro.anchor_logprobs
            moved += np.abs(change).sum(), len(change)
        total, count = self.ranks.sum(moved)
        return float(total / count)

    def gradient(self, batch: Batch, plan: MemoryPlan) -> tuple[Any, _Totals]:
        """Gradient of the objective over the batch, divided once by Z, and the sums it comes from.

        With several ranks each computes its share of the batch, and all get the sum.
        """
        value_and_grad = nn.value_and_grad(self.policy.model, self._loss)
        total, gradient = _Totals(), None
        for micro in self._micro_batches(batch, plan):
            self._beat()
            reference = self._reference(micro, plan.head_chunk)
            (_, sums), grad = value_and_grad(micro, reference, plan)
            gradient = grad if gradient is None else tree_map(mx.add, gradient, grad)
            # Frees this micro-batch's graph before the next one is built.
            mx.eval(gradient, *vars(sums).values())
            total.add(sums, micro)
        if self.ranks.size > 1:
            gradient, total = self._of_all(gradient, total)
        return tree_map(lambda g: g / batch.z, gradient), total

    def _of_all(self, gradient: Any, total: _Totals) -> tuple[Any, _Totals]:
        """Sum gradients and totals over ranks; gradient: None if this rank computed nothing."""
        if gradient is None:
            gradient = tree_map(mx.zeros_like, self.policy.model.trainable_parameters())
        flat: Any = tree_flatten(gradient)
        whole = self.ranks.sum(np.concatenate([array.ravel() for array in _views(gradient)]))
        ends = np.cumsum([array.size for _, array in flat])[:-1]
        summed = [
            (name, mx.array(part.reshape(array.shape)))
            for (name, array), part in zip(flat, np.split(whole, ends), strict=True)
        ]
        totals = [json.loads(one) for one in self.ranks.gather(json.dumps(vars(total)).encode())]
        return tree_unflatten(summed), _Totals.of(totals)

    def _micro_batches(self, batch: Batch, plan: MemoryPlan) -> Iterator[MicroBatch]:
        """Pack the batch as forests, or as plain rows for families that cannot score forests."""
        if not batch.nodes:  # another rank has it all
            return iter(())
        if self.shared is None:
            self.shared = forest_agrees(
                self.policy, batch, temperature=self.temperature, head_chunk=plan.head_chunk
            )
            if not self.shared:
                self._warn(
                    "this model's family scores shared prefixes differently from whole sequences, "
                    "so the update computes every completion separately, which is slower"
                )
        pack = forest_batches if self.shared else row_batches
        return pack(batch, plan.micro_rows)

    def _loss(
        self, micro: MicroBatch, reference: mx.array | None, plan: MemoryPlan
    ) -> tuple[mx.array, ObjectiveSums]:
        logprobs = self.policy.engine.token_logprobs(
            micro,
            temperature=self.temperature,
            head_chunk=plan.head_chunk,
            gradient=True,
            recompute=plan.grad_checkpoint,
        )
        anchors, coefficients = mx.array(micro.anchor_logprobs), mx.array(micro.coefficients)
        sums = policy_sums(self.objective, logprobs, anchors, coefficients, micro.rows)
        if reference is not None:
            weights = mx.array(micro.kl_weights)
            loss, value = kl_terms(self.objective.kl_estimator, logprobs, reference, anchors)
            loss = sums.loss + (weights * loss).sum()
            sums = replace(sums, loss=loss, kl=(weights * value).sum())
        return sums.loss, sums

    def _reference(self, micro: MicroBatch, head_chunk: int) -> mx.array | None:
        """Log-probabilities (N,) without the adapters; None if all KL weights are 0."""
        if not micro.kl_weights.any():
            return None
        with adapters_off(self.policy.model):
            logprobs = self._logprobs(micro, head_chunk)
        # Evaluated now so that this pass's activations are freed before the next pass.
        mx.eval(logprobs)
        return logprobs

    def _logprobs(self, micro: MicroBatch, head_chunk: int) -> mx.array:
        return self.policy.engine.token_logprobs(
            micro, temperature=self.temperature, head_chunk=head_chunk
        )

    def _apply(self, batch: Batch, plan: MemoryPlan) -> StepStats:
        gradient, total = self.gradient(batch, plan)
        norm = global_norm(gradient)
        if not np.isfinite([norm, total.loss]).all():
            return total.stats(batch.z, norm, problem=f"loss {total.loss}, gradient norm {norm}")
        before = self._state()
        factor = min(1.0, self.config.max_grad_norm / (norm + 1e-12))
        self.optimizer.learning_rate = self.learning_rate
        self.optimizer.update(self.policy.model, tree_map(lambda g: g * factor, gradient))
        mx.eval(self.policy.model.trainable_parameters(), self.optimizer.state)
        self.updates += 1
        if not _finite(self._state()[0]):
            self._put_back(before)
            return total.stats(batch.z, norm, problem="the updated adapters were not finite")
        return total.stats(batch.z, norm)

    def _state(self) -> _State:
        """The state an update changes. Arrays are never modified in place, so nothing is copied."""
        parts = (self.policy.model.trainable_parameters(), self.optimizer.state)
        return tree_map(lambda array: array, parts), self.updates

    def _put_back(self, state: _State) -> None:
        (adapters, moments), self.updates = state
        self.policy.model.update(adapters)
        self.optimizer.state = moments

    def _count(self, problem: str | None) -> None:
        """Count consecutive failed steps: one bad update would ruin the adapters permanently.

        Raises: LocalRLError if there are too many.
        """
        self.skipped = self.skipped + 1 if problem else 0
        if self.skipped >= MOST_SKIPPED:
            raise LocalRLError(
                f"An update was not finite {self.skipped} times in a row (the last time: "
                f"{problem}). The adapter has diverged; the last checkpoint holds its state from "
                f"before. Start again with learning.lr below {self.config.lr:g}."
            )


@dataclass
class _Totals:
    """The sums of all micro-batches as plain numbers."""

    loss: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    gap: float = 0.0
    gap_max: float = 0.0
    kl: float = 0.0
    kl_weight: float = 0.0
    tokens: int = 0
    saved_positions: int = 0

    @classmethod
    def of(cls, parts: Sequence[dict[str, Any]]) -> _Totals:
        """Combine the totals of all ranks, each given as its fields."""
        total = cls(**{name: sum(part[name] for part in parts) for name in parts[0]})
        total.gap_max = max(part["gap_max"] for part in parts)
        return total

    def add(self, sums: ObjectiveSums, micro: MicroBatch) -> None:
        self.loss += _number(sums.loss)
        self.clipped_low += _number(sums.clipped_low)
        self.clipped_high += _number(sums.clipped_high)
        self.gap += _number(sums.gap)
        self.gap_max = max(self.gap_max, _number(sums.gap_max))
        self.kl += _number(sums.kl)
        self.kl_weight += float(micro.kl_weights.sum())
        self.tokens += len(micro.targets)
        self.saved_positions += micro.saved_positions

    def stats(self, z: float, norm: float, *, problem: str | None = None) -> StepStats:
        return StepStats(
            loss=self.loss / z,
            grad_norm=norm,
            clipped_low=self.clipped_low / self.tokens,
            clipped_high=self.clipped_high / self.tokens,
            logprob_gap_mean=self.gap / self.tokens,
            logprob_gap_max=self.gap_max,
            kl=self.kl / self.kl_weight if self.kl_weight > 0 else None,
            drift=None,
            trained_tokens=self.tokens,
            saved_positions=self.saved_positions,
            updated=problem is None,
            problem=problem,
        )


def _some(batch: Batch, tokens: int) -> Batch:
    """The first trees of a batch that together have this many trained tokens, or all of it."""
    seen = 0
    for n, node in enumerate(batch.nodes):
        if seen >= tokens and node.parent < 0:
            prompts = batch.prompts[: batch.nodes[n - 1].prompt + 1]
            return replace(batch, prompts=prompts, nodes=batch.nodes[:n])
        seen += int(node.trained.sum())
    return batch


def _finite(tree: Any) -> bool:
    """Return True if all numbers in a tree of arrays are finite."""
    return all(np.isfinite(array).all() for array in _views(tree))


def global_norm(tree: Any) -> float:
    """Joint Euclidean norm of all float32 arrays in a tree."""
    # In NumPy, because hundreds of small arrays would be as many operations in MLX's graph.
    return math.sqrt(sum(float(np.vdot(array, array)) for array in _views(tree)))


def _views(tree: Any) -> Iterator[np.ndarray]:
    mx.eval(tree)
    flat: Any = tree_flatten(tree)
    return (np.array(array, copy=False) for _, array in flat)


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar))
