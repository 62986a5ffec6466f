"""On-policy distillation towards tokens of a model that is shown the answer, as a stage.

The policy samples y for a prompt x. The teacher q is the initial model (or `model.adapter`) with
the right answer shown as an earlier turn, see `distillation.with_turn`. At every prefix of y the
teacher draws a token v_t of its own, and that is the target in place of y_t:

    loss = - 1/Z sum over t of log p(v_t | x, y_<t),    Z the step's sampled tokens

Its mean over the draws has the gradient of the sum of KL(q(. given s), p(. given s)) over the
prefixes s of y, which are constants. So it is on-policy distillation with the forward KL (GKD,
Agarwal et al. 2024, 2306.13649) from a teacher that is the model itself (OPSD, Zhao et al. 2026,
2601.18734, which compares whole distributions), and only of completions that are not right (SRPO,
Li et al. 2026, 2604.02288): others have nothing to learn and cost neither pass. It is biased, being
no gradient of the expected reward, which only decides what is left out.

Where `distillation` scores the tokens that were sampled, most of what it finds is that they were
wrong, and probability goes anywhere: in one seed of `facts` SmolLM2 falls to 0.09 before it rises.
A drawn target says what is right. It works in one process, on the CPU engine, with flat groups in
float32.

Also tried on `facts`, one or two seeds each: a teacher that learns along loses what it had learned
(0.47 after 7,000 tokens, 0.06 after 16,000). With 4 prompts of 8 completions, right ones taught
too, it takes 5,400 tokens to 0.5, and at twice and four times the learning rate it was not there
after 5,000, where 16 prompts of 2 take 3,500. On `three facts`, whose reward takes an object
anywhere in a text, it never reaches 0.75.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from distillation import with_turn
from rivals import instead

from localrl.engines.cpu.buffers import release_all
from localrl.engines.cpu.forward import ForwardPass
from localrl.engines.cpu.sampling import draw
from localrl.learning.credit import Credit
from localrl.learning.gradient import GradientPass
from localrl.learning.selection import Selection
from localrl.learning.update import Updater
from localrl.policy.packing import MicroBatch, forest_batches
from localrl.policy.scoring import whole_batch
from localrl.records import Batch, BatchNode, Group, MemoryPlan, ScoredGroup
from localrl.training.session import Session
from localrl.utils.rng import keyed_uniforms

TAUGHT = "taught"
"""Name of the stage."""


def with_teacher(session: Session) -> Session:
    """Return the session with targets from the model that is shown the answer."""
    own = session.updater
    # As in a supervised run: no sampler has drawn the targets.
    temperature = own.gradient.temperature
    updater = Updater(own.policy, own.config, temperature, supervised=True)
    updater.gradient = TargetPass(own.policy, updater.objective, temperature, supervised=True)
    session.updater = updater
    return instead(Taught, session)


@dataclass(frozen=True)
class TaughtNode(BatchNode):
    """A node of which each position has a token to learn, whatever stands there."""

    targets: np.ndarray
    """(n,) int32."""


class TargetPass(GradientPass):
    """A gradient of the targets of nodes in place of their tokens."""

    def micro_batches(self, batch: Batch, plan: MemoryPlan) -> Iterator[MicroBatch]:
        for micro in super().micro_batches(batch, plan):
            firsts = np.concatenate([[0], np.flatnonzero(np.diff(micro.nodes)) + 1])
            nodes = [batch.nodes[n] for n in micro.nodes[firsts]]
            targets = [n.targets if isinstance(n, TaughtNode) else n.token_ids for n in nodes]
            trained = [each[n.trained] for each, n in zip(targets, nodes, strict=True)]
            yield replace(micro, targets=np.concatenate(trained))


@dataclass(eq=False)
class Taught(Session):
    """A session that learns the teacher's tokens wherever a completion is not right."""

    def select(
        self, step: int, scored: Sequence[ScoredGroup], credits: Sequence[Credit]
    ) -> Selection:
        """Return the batch of a step: the completions that are not right, with their targets."""
        wrong = [only_wrong(each, credit) for each, credit in zip(scored, credits, strict=True)]
        selection = super().select(step, scored, wrong)
        used = zip(scored, wrong, selection.kept, strict=True)
        kept = [(group.group, credit.advantages) for group, credit, kept in used if kept]
        found = self.targets(step, [_without(group, factors) for group, factors in kept])
        drawn = (targets for group in found for targets in group)
        factors = [factor for _, factors in kept for factor in factors]
        nodes = [
            _taught(node, next(drawn) if factor else node.token_ids)
            for node, factor in zip(selection.batch.nodes, factors, strict=True)
        ]
        return replace(selection, batch=replace(selection.batch, nodes=tuple(nodes)))

    def targets(self, step: int, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        """Draw the teacher's tokens (n,) behind every prefix of every completion."""
        examples = [with_turn(group.example) for group in groups]
        prompts = self.policy.tokenizer.encode_prompts(examples)
        shown = [replace(g, prompt_ids=p) for g, p in zip(groups, prompts, strict=True)]
        seed = self.config.run.seed
        uniforms = [
            keyed_uniforms(len(node.token_ids), seed, step, group.example.id, n, "teacher")
            for group in groups
            for n, node in enumerate(group.nodes)
        ]
        with self.policy.as_reference():
            found = iter(self._draw(whole_batch(shown), uniforms))
        return [[next(found) for _ in group.nodes] for group in groups]

    def _draw(self, batch: Batch, uniforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Draw a token (n,) behind every prefix of every node. uniforms: (n,) of each node."""
        found = [np.empty(0, np.int32)] * len(batch.nodes)
        temperature = self.updater.gradient.temperature
        for micro in forest_batches(batch, self.plan.micro_rows):
            one = ForwardPass(self.policy.engine.model, micro.tokens.levels, keep=False)
            states = one.forward()[:, micro.sources]
            starts = np.concatenate([[0], np.flatnonzero(np.diff(micro.nodes)) + 1])
            marks = np.concatenate([uniforms[n] for n in micro.nodes[starts]])
            tokens: list[np.ndarray] = []
            for start in range(0, len(marks), self.plan.head_chunk):
                part = slice(start, start + self.plan.head_chunk)
                logits = one.weights.logits(np.ascontiguousarray(states[:, part]))
                tokens.append(np.array(draw(logits, marks[part], temperature)[0]))
            release_all()
            parts = np.split(np.concatenate(tokens).astype(np.int32), starts[1:])
            for n, drawn in zip(micro.nodes[starts], parts, strict=True):
                found[n] = drawn
        return found


def only_wrong(scored: ScoredGroup, credit: Credit) -> Credit:
    """Return an advantage of 1 for completions that are not right and 0 for those that are.

    One without a reward keeps none.
    """
    factors = (None if r is None else float(r < 1) for r in scored.rewards)
    return replace(credit, advantages=tuple(factors))


def _without(group: Group, factors: Sequence[float | None]) -> Group:
    """Return a flat group without the nodes that have no factor or 0, as they are not learned."""
    pairs = zip(group.nodes, factors, strict=True)
    return replace(group, nodes=tuple(node for node, factor in pairs if factor))


def _taught(node: BatchNode, targets: np.ndarray) -> TaughtNode:
    unknown = np.full(len(node.token_ids), np.nan, np.float32)
    return TaughtNode(**vars(node) | {"anchor_logprobs": unknown}, targets=targets)
