"""The update: one optimizer step for each mini-batch, undone if it is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from localrl.backend import mx, optim, tree_map
from localrl.distributed.shard import shard_batch
from localrl.errors import LocalRLError
from localrl.learning.gradient import GradientPass, views
from localrl.learning.objectives import make_objective
from localrl.learning.pass_logprobs import PassLogprobs
from localrl.learning.schedule import rate_factor
from localrl.learning.totals import Applied, joined
from localrl.policy.model import Policy
from localrl.policy.size import relative_size, weight_norms
from localrl.records import Batch, MemoryPlan, StepStats, Work
from localrl.settings import LearningConfig
from localrl.utils.rounding import beyond_rounding

LOGGER = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Consecutive steps with an update that is not finite after which the run ends."""

_State = tuple[Any, int]
"""Adapters and optimizer state, and the number of updates made."""

DRIFT_TOKENS = 128
"""Number of trained tokens on which the policy's drift is measured."""

NO_UPDATE = StepStats(*(None,) * 9, trained_tokens=0, saved_positions=0, updated=False)


class Updater:
    """Applies Adam to the adapters of a policy; nothing else changes them."""

    def __init__(
        self,
        policy: Policy,
        config: LearningConfig,
        temperature: float,
        warn: Callable[[str], None] = LOGGER.warning,
        beat: Callable[[Work], None] = lambda work: None,
        planned: int = 0,
        *,
        supervised: bool = False,
    ) -> None:
        """planned: number of updates of the whole run, for the schedule of the learning rate.

        supervised: True if completions are given, and no sampler has written them.
        """
        self.policy = policy
        self.config = config
        self.objective = make_objective(config, supervised=supervised)
        self.gradient = GradientPass(
            policy, self.objective, temperature, warn, beat, supervised=supervised
        )
        self._supervised = supervised
        self._planned = planned
        self._norms: mx.array | None = None
        self.updates = 0
        self.skipped = 0
        """Number of consecutive steps without an update."""
        # Every update sets its own rate.
        self.optimizer = optim.Adam(learning_rate=0.0, bias_correction=True)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update: rises over the warm-up, then follows the schedule."""
        schedule, warmup = self.config.lr_schedule, self.config.warmup_steps
        return self.config.lr * rate_factor(
            schedule, self.updates, warmup=warmup, planned=self._planned
        )

    def update(self, batch: Batch, plan: MemoryPlan) -> StepStats:
        """Update the adapters on one step's batch, one mini-batch after another.

        A mini-batch without anything to train is left out, so an empty batch changes nothing.

        With several ranks each gets the whole batch, computes its share of it, and applies the same
        update from the sum.

        If the loss, the gradient, an adapter, or a log-probability under the new adapters is not
        finite, the adapters and the optimizer are left or restored as they were.

        Raises: LocalRLError if that happens in several consecutive steps.
        """
        parts, before = self._parts(batch), self._state()
        if not parts:
            return NO_UPDATE
        self.gradient.choose_packing(parts[0], plan)
        sample = _some(parts[0], DRIFT_TOKENS // self.gradient.ranks.size)
        # In float32 the first gradient pass serves; in 16 bits it rounds by its own batch shapes.
        unmoved = self.gradient.score(sample, plan) if self.policy.sixteen_bit else None
        first = last = self._pass(parts, plan)
        for _ in range(self.config.updates_per_step - 1):
            # Repeating a failed update would fail the same way.
            last = last if last[-1].problem else self._pass(parts, plan, first)
        stats, problem, drift = joined(first, batch.z), last[-1].problem, None
        if stats.updated:
            start = first[0].total.logprobs if unmoved is None else unmoved
            drift = self._drift(sample, start, plan)
            if not np.isfinite(drift):
                self._put_back(before)
                problem, drift = "log-probabilities after the update were not finite", None
        self._count(problem)
        updated = drift is not None
        if self._supervised:
            stats = replace(stats, logprob_gap_mean=None, logprob_gap_max=None, truncated=None)
        ended = joined(last, batch.z)
        return replace(
            stats,
            clipped_low=ended.clipped_low,
            clipped_high=ended.clipped_high,
            drift=drift,
            updated=updated,
            problem=problem,
            relative_size=self._relative_size() if updated else None,
        )

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return this rank's share of each mini-batch with something to train.

        Each is divided by its part of Z, so their updates are on average as large as one on all.
        """
        count = self.config.minibatches
        parts = [replace(shard_batch(batch, n, count), z=batch.z / count) for n in range(count)]
        return [
            shard_batch(part, self.gradient.ranks.rank, self.gradient.ranks.size)
            for part in parts
            if any(node.trained.any() for node in part.nodes)
        ]

    def _pass(
        self, parts: Sequence[Batch], plan: MemoryPlan, first: Sequence[Applied] = ()
    ) -> list[Applied]:
        """Make an update on each mini-batch, until one fails. first: the step's first pass.

        Each mini-batch's ratios begin at 1 in its own first pass. That the policy has moved since
        it was sampled is corrected as for any other sampler, see `objective.sampler_correction`.
        """
        done: list[Applied] = []
        for n, part in enumerate(parts):
            done.append(self._apply(part, plan, first[n].total.logprobs if first else None))
            if done[-1].problem:
                break
        return done

    def _relative_size(self) -> float:
        if self._norms is None:
            self._norms = weight_norms(self.policy.model)
        return relative_size(self.policy.model, self._norms)

    def _drift(self, sample: Batch, before: PassLogprobs, plan: MemoryPlan) -> float:
        """Mean |log-probability now - at the start of the step| over the sample's trained tokens.

        One forward pass, over enough trees for `DRIFT_TOKENS` tokens. In 16 bits what rounding
        explains, by the gap between sampler and update on the same tokens, is taken off.
        """
        sums = np.zeros(4)  # of changes, their squares, the gap's squares, and tokens
        sixteen_bit = self.policy.sixteen_bit
        for micro in self.gradient.micro_batches(sample, plan):
            known = before.of(micro)
            change = np.array(self.gradient.logprobs(micro, plan.head_chunk)) - known
            gap = np.nan_to_num(known - micro.anchor_logprobs) * sixteen_bit
            sums += np.array([np.abs(change).sum(), change @ change, gap @ gap, len(change)])
        total, moved, rounding, count = (float(number) for number in self.gradient.ranks.sum(sums))
        return total / count * math.sqrt(beyond_rounding(moved, rounding))

    def _apply(self, batch: Batch, plan: MemoryPlan, first: PassLogprobs | None = None) -> Applied:
        """Make one update."""
        gradient, total = self.gradient(batch, plan, first)
        norm = global_norm(gradient)
        if np.isfinite([norm, total.loss]).all():
            problem = self._optimise(gradient, norm)
        else:
            problem = f"loss {total.loss}, gradient norm {norm}"
        return Applied(total, norm, problem)

    def _optimise(self, gradient: Any, norm: float) -> str | None:
        """Make a step of the optimizer; return what was wrong with it if it was undone."""
        before = self._state()
        factor = min(1.0, self.config.max_grad_norm / (norm + 1e-12))
        self.optimizer.learning_rate = self.learning_rate
        self.optimizer.update(self.policy.model, tree_map(lambda g: g * factor, gradient))
        mx.eval(self.policy.model.trainable_parameters(), self.optimizer.state)
        self.updates += 1
        if _finite(self._state()[0]):
            return None
        self._put_back(before)
        return "the updated adapters were not finite"

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
    return all(np.isfinite(array).all() for array in views(tree))


def global_norm(tree: Any) -> float:
    """Joint Euclidean norm of all float32 arrays in a tree."""
    # In NumPy, because hundreds of small arrays would be as many operations in MLX's graph.
    return math.sqrt(sum(float(np.vdot(array, array)) for array in views(tree)))
