"""The update: micro-batches, one gradient sum, one division, one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.backend import mx, nn, optim, tree_flatten, tree_map
from localrl.config import LearningConfig
from localrl.errors import LocalRLError
from localrl.learning.objective import ObjectiveSums, clipped_objective
from localrl.policy.model import Policy
from localrl.policy.packing import MicroBatch, Row, micro_batches, rows
from localrl.policy.scoring import token_logprobs
from localrl.records import Batch, MemoryPlan, StepStats

MOST_SKIPPED = 3
"""Updates in a row that may be skipped for a gradient that is not finite."""

NO_UPDATE = StepStats(None, None, None, None, None, None, trained_tokens=0, updated=False)


class Updater:
    """Adam on the adapters of a policy; the only thing that changes them."""

    def __init__(self, policy: Policy, config: LearningConfig, temperature: float) -> None:
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.updates = 0
        self._skipped = 0
        self._optimizer = optim.Adam(learning_rate=config.lr, bias_correction=True)

    @property
    def learning_rate(self) -> float:
        """Of the next update: rises linearly over the warm-up, then stays."""
        return self.config.lr * min(1.0, (self.updates + 1) / (self.config.warmup_steps + 1))

    def update(self, batch: Batch, plan: MemoryPlan) -> StepStats:
        """Update the adapters on one step's batch; an empty batch changes nothing.

        Raises: LocalRLError when the gradient was not finite several times in a row.
        """
        sequences = rows(batch)
        if not sequences:
            return NO_UPDATE
        first = self._apply(sequences, batch.z, plan)
        for _ in range(self.config.updates_per_step - 1):
            self._apply(sequences, batch.z, plan)
        return first

    def gradient(self, sequences: Sequence[Row], z: float, plan: MemoryPlan) -> tuple[Any, _Totals]:
        """Gradient of the objective over these rows, divided once by z; and the sums behind it."""
        value_and_grad = nn.value_and_grad(self.policy.model, self._loss)
        total, gradient = _Totals(), None
        for micro in micro_batches(sequences, plan.micro_rows):
            (_, sums), grad = value_and_grad(micro, plan.head_chunk)
            gradient = grad if gradient is None else tree_map(mx.add, gradient, grad)
            # Frees this micro-batch's graph before the next one is built.
            mx.eval(gradient, *vars(sums).values())
            total.add(sums, len(micro.targets))
        return tree_map(lambda g: g / z, gradient), total

    def _loss(self, micro: MicroBatch, head_chunk: int) -> tuple[mx.array, ObjectiveSums]:
        logprobs = token_logprobs(
            self.policy,
            mx.array(micro.tokens),
            mx.array(micro.sources),
            mx.array(micro.targets),
            temperature=self.temperature,
            head_chunk=head_chunk,
        )
        sums = clipped_objective(
            logprobs,
            mx.array(micro.sampled_logprobs),
            mx.array(micro.coefficients),
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
        )
        return sums.loss, sums

    def _apply(self, sequences: Sequence[Row], z: float, plan: MemoryPlan) -> StepStats:
        gradient, total = self.gradient(sequences, z, plan)
        norm = global_norm(gradient)
        if not np.isfinite([norm, total.loss]).all():
            self._skip(norm)
            return total.stats(z, norm, updated=False)
        self._skipped = 0
        factor = min(1.0, self.config.max_grad_norm / (norm + 1e-12))
        self._optimizer.learning_rate = self.learning_rate
        self._optimizer.update(self.policy.model, tree_map(lambda g: g * factor, gradient))
        mx.eval(self.policy.model.trainable_parameters(), self._optimizer.state)
        self.updates += 1
        return total.stats(z, norm, updated=True)

    def _skip(self, norm: float) -> None:
        """Leave the adapters as they are: one bad gradient would ruin them for good."""
        self._skipped += 1
        if self._skipped >= MOST_SKIPPED:
            raise LocalRLError(
                f"The gradient was not finite {self._skipped} times in a row (norm {norm}). The "
                "adapter has diverged: start again with a lower learning.lr."
            )


@dataclass
class _Totals:
    """The sums of all micro-batches as plain numbers."""

    loss: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    gap: float = 0.0
    gap_max: float = 0.0
    tokens: int = 0

    def add(self, sums: ObjectiveSums, tokens: int) -> None:
        self.loss += _number(sums.loss)
        self.clipped_low += _number(sums.clipped_low)
        self.clipped_high += _number(sums.clipped_high)
        self.gap += _number(sums.gap)
        self.gap_max = max(self.gap_max, _number(sums.gap_max))
        self.tokens += tokens

    def stats(self, z: float, norm: float, *, updated: bool) -> StepStats:
        return StepStats(
            loss=self.loss / z,
            grad_norm=norm,
            clipped_low=self.clipped_low / self.tokens,
            clipped_high=self.clipped_high / self.tokens,
            logprob_gap_mean=self.gap / self.tokens,
            logprob_gap_max=self.gap_max,
            trained_tokens=self.tokens,
            updated=updated,
        )


def global_norm(tree: Any) -> float:
    """Euclidean norm of all arrays of a tree together."""
    flat: Any = tree_flatten(tree)
    squares = [mx.square(array.astype(mx.float32)).sum() for _, array in flat]
    return _number(mx.sqrt(mx.stack(squares).sum()))


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar))
