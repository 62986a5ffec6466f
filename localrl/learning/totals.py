"""The sums of a gradient pass over all micro-batches and ranks, and the statistics made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.learning.objective import ObjectiveSums
from localrl.learning.pass_logprobs import PassLogprobs
from localrl.policy.packing import MicroBatch
from localrl.records import StepStats


@dataclass
class Totals:
    """The sums of all micro-batches as plain numbers."""

    loss: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    gap: float = 0.0
    gap_max: float = 0.0
    truncated: float = 0.0
    kl: float = 0.0
    kl_weight: float = 0.0
    tokens: int = 0
    saved_positions: int = 0
    logprobs: PassLogprobs = field(default_factory=PassLogprobs)
    """The log-probabilities that the pass computed; of several ranks each keeps its own."""

    @classmethod
    def of(cls, parts: Sequence[dict[str, Any]], logprobs: PassLogprobs) -> Totals:
        """Combine the sums of all ranks with this rank's log-probabilities."""
        summed = {name: sum(part[name] for part in parts) for name in parts[0]}
        total = cls(**summed, logprobs=logprobs)
        total.gap_max = max(part["gap_max"] for part in parts)
        return total

    def sums(self) -> dict[str, float]:
        """Return everything but the log-probabilities."""
        return {name: value for name, value in vars(self).items() if name != "logprobs"}

    def add(self, sums: ObjectiveSums, micro: MicroBatch) -> None:
        """Add the sums of a micro-batch."""
        self.loss += _number(sums.loss)
        self.clipped_low += _number(sums.clipped_low)
        self.clipped_high += _number(sums.clipped_high)
        self.gap += _number(sums.gap)
        self.gap_max = max(self.gap_max, _number(sums.gap_max))
        self.truncated += _number(sums.truncated)
        self.kl += _number(sums.kl)
        self.kl_weight += float(micro.kl_weights.sum())
        self.tokens += len(micro.targets)
        self.saved_positions += micro.saved_positions

    def stats(self, z: float, norm: float, *, problem: str | None = None) -> StepStats:
        """Return the statistics of updates with this denominator in all and mean gradient norm."""
        return StepStats(
            loss=self.loss / z,
            grad_norm=norm,
            clipped_low=self.clipped_low / self.tokens,
            clipped_high=self.clipped_high / self.tokens,
            logprob_gap_mean=self.gap / self.tokens,
            logprob_gap_max=self.gap_max,
            truncated=self.truncated / self.tokens,
            kl=self.kl / self.kl_weight if self.kl_weight > 0 else None,
            drift=None,
            trained_tokens=self.tokens,
            saved_positions=self.saved_positions,
            updated=problem is None,
            problem=problem,
        )


@dataclass(frozen=True)
class Applied:
    """One update."""

    total: Totals
    norm: float
    """Norm of its gradient, before clipping."""
    problem: str | None
    """Reason it was not made, or undone."""


def joined(updates: Sequence[Applied], z: float) -> StepStats:
    """Return the statistics of a pass's updates, one for each mini-batch. z: of the whole batch."""
    totals = [one.total for one in updates]
    total = Totals.of([each.sums() for each in totals], totals[0].logprobs)
    norm = sum(one.norm for one in updates) / len(updates)
    return total.stats(z, norm, problem=updates[-1].problem)


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar))
