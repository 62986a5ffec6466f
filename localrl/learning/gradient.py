"""The gradient of the objective over a batch: micro-batches, one sum, one division."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from localrl.backend import mx, nn, tree_flatten, tree_map, tree_unflatten
from localrl.distributed.collective import ALONE, Ranks
from localrl.learning.objective import ObjectiveSums, kl_terms, policy_sums, sampler_correction
from localrl.learning.objectives import Objective
from localrl.learning.pass_logprobs import PassLogprobs
from localrl.learning.totals import Totals
from localrl.policy.model import Policy
from localrl.policy.packing import MicroBatch, forest_batches, row_batches
from localrl.policy.scoring import forest_agrees
from localrl.records import Batch, MemoryPlan, Work

LOGGER = logging.getLogger(__name__)


class GradientPass:
    """Computes the gradient of an objective over batches; it changes nothing of the policy."""

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        temperature: float,
        warn: Callable[[str], None] = LOGGER.warning,
        beat: Callable[[Work], None] = lambda work: None,
        *,
        supervised: bool = False,
    ) -> None:
        """supervised: True if completions are given, and no sampler has written them."""
        self.policy = policy
        self.objective = objective
        self.temperature = temperature
        self.ranks: Ranks = ALONE
        """The ranks that share each batch."""
        self.shared: bool | None = None
        """True if prompts and nodes are computed once; None until checked on the first batch."""
        self._warn = warn
        self._beat = beat
        self._supervised = supervised

    def __call__(
        self, batch: Batch, plan: MemoryPlan, first: PassLogprobs | None = None
    ) -> tuple[Any, Totals]:
        """Gradient of the objective over the batch, divided once by Z, and the sums it comes from.

        first: the log-probabilities to clip around, of the step's first pass; None: this pass is
        the first. With several ranks each computes its share of the batch, and all get the sum.
        """
        value_and_grad = nn.value_and_grad(self.policy.model, self._loss)
        total, gradient = Totals(), None
        self.choose_packing(batch, plan)
        done, tokens = 0, sum(int(node.trained.sum()) for node in batch.nodes)
        for micro in self.micro_batches(batch, plan):
            self._beat(Work("learning", done, tokens))
            done += len(micro.anchor_logprobs)
            reference = self._reference(micro, plan.head_chunk)
            known = None if first is None else mx.array(first.of(micro))
            (_, sums, logprobs), grad = value_and_grad(micro, reference, known, plan)
            gradient = grad if gradient is None else tree_map(mx.add, gradient, grad)
            # Frees this micro-batch's graph before the next one is built.
            mx.eval(*vars(sums).values(), logprobs, gradient)
            total.add(sums, micro)
            total.logprobs.add(micro, np.array(logprobs))
        if self.ranks.size > 1:
            gradient, total = self._of_all(gradient, total)
        return tree_map(lambda g: g / batch.z, gradient), total

    def score(self, batch: Batch, plan: MemoryPlan) -> PassLogprobs:
        """Log-probabilities of the trained tokens as the adapters are, without a gradient."""
        found = PassLogprobs()
        for micro in self.micro_batches(batch, plan):
            found.add(micro, np.array(self.logprobs(micro, plan.head_chunk)))
        return found

    def choose_packing(self, batch: Batch, plan: MemoryPlan) -> None:
        """Check once, on the first batch, if the family can be scored as forests."""
        if self.shared is not None or not batch.nodes:  # another rank has it all
            return
        self.shared = forest_agrees(
            self.policy, batch, temperature=self.temperature, head_chunk=plan.head_chunk
        )
        if not self.shared:
            self._warn(
                "this model's family scores shared prefixes differently from whole sequences, "
                "so the update computes every completion separately, which is slower"
            )

    def micro_batches(self, batch: Batch, plan: MemoryPlan) -> Iterator[MicroBatch]:
        """Pack the batch as forests, or as plain rows for families that cannot score forests."""
        pack = forest_batches if self.shared else row_batches
        return pack(batch, plan.micro_rows)

    def logprobs(self, micro: MicroBatch, head_chunk: int) -> mx.array:
        """Log-probabilities (N,) of a micro-batch's trained tokens as the adapters are."""
        return self.policy.engine.token_logprobs(
            micro, temperature=self.temperature, head_chunk=head_chunk
        )

    def _of_all(self, gradient: Any, total: Totals) -> tuple[Any, Totals]:
        """Sum gradients and totals over ranks; gradient: None if this rank computed nothing."""
        if gradient is None:
            gradient = tree_map(mx.zeros_like, self.policy.model.trainable_parameters())
        flat: Any = tree_flatten(gradient)
        whole = self.ranks.sum(np.concatenate([array.ravel() for array in views(gradient)]))
        ends = np.cumsum([array.size for _, array in flat])[:-1]
        summed = [
            (name, mx.array(part.reshape(array.shape)))
            for (name, array), part in zip(flat, np.split(whole, ends), strict=True)
        ]
        told = self.ranks.gather(json.dumps(total.sums()).encode())
        return tree_unflatten(summed), Totals.of([json.loads(one) for one in told], total.logprobs)

    def _loss(
        self,
        micro: MicroBatch,
        reference: mx.array | None,
        first: mx.array | None,
        plan: MemoryPlan,
    ) -> tuple[mx.array, ObjectiveSums, mx.array]:
        """Loss of a micro-batch, its sums, and its log-probabilities (N,) without a gradient."""
        logprobs = self.policy.engine.token_logprobs(
            micro,
            temperature=self.temperature,
            head_chunk=plan.head_chunk,
            gradient=True,
            recompute=plan.grad_checkpoint,
        )
        own = mx.stop_gradient(logprobs)
        first = own if first is None else first
        anchors, coefficients = mx.array(micro.anchor_logprobs), mx.array(micro.coefficients)
        # A token that no sampler wrote needs no correction for one.
        anchors = mx.where(mx.isnan(anchors), first, anchors) if self._supervised else anchors
        sums = policy_sums(self.objective, logprobs, first, anchors, coefficients, micro.rows)
        if reference is not None:
            weights = mx.array(micro.kl_weights)
            ratio = sampler_correction(first, anchors) * mx.exp(logprobs - first)
            loss, value = kl_terms(self.objective.kl_estimator, logprobs, reference, ratio)
            loss = sums.loss + (weights * loss).sum()
            sums = replace(sums, loss=loss, kl=(weights * value).sum())
        return sums.loss, sums, own

    def _reference(self, micro: MicroBatch, head_chunk: int) -> mx.array | None:
        """Log-probabilities (N,) under the KL's reference; None if all KL weights are 0."""
        if not micro.kl_weights.any():
            return None
        with self.policy.as_reference():
            logprobs = self.logprobs(micro, head_chunk)
        # Evaluated now so that this pass's activations are freed before the next pass.
        mx.eval(logprobs)
        return logprobs


def views(tree: Any) -> Iterator[np.ndarray]:
    """Return the arrays of a tree as NumPy's, without copies."""
    mx.eval(tree)
    flat: Any = tree_flatten(tree)
    return (np.array(array, copy=False) for _, array in flat)
