"""Selection of the rollouts that reach the optimizer, and the batch made of them.

The coefficient of each token is fixed here, before the update:

    coefficient = share * advantage * importance of its prefix

and 0 for repeated text. Tokens whose coefficient is 0 cost nothing in the update.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.learning.credit import Credit, token_coefficients
from localrl.learning.objectives import Objective, token_shares
from localrl.learning.staleness import anchor_logprobs, importance
from localrl.records import Batch, BatchNode, DropReason, Group, ScoredGroup
from localrl.utils.repetition import repeated_from

NEGLIGIBLE = 1e-8
"""Coefficients up to this size are treated as 0."""


@dataclass(frozen=True)
class Selection:
    """The batch of a step, and a record of what was left out of it."""

    batch: Batch
    informative: tuple[bool, ...]
    """True for each group with a coefficient that is not negligible."""
    dropped: tuple[tuple[DropReason | None, ...], ...]
    """Reason each completion of each group is not in the batch; None if it is."""

    @property
    def kept(self) -> tuple[bool, ...]:
        """True for each group with completions in the batch; with a KL coefficients may be 0."""
        return tuple(any(reason is None for reason in reasons) for reasons in self.dropped)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens of the batch with a coefficient or a KL weight."""
        return sum(int(node.trained.sum()) for node in self.batch.nodes)


def select(
    scored: Sequence[ScoredGroup],
    credits: Sequence[Credit],
    z: float,
    objective: Objective,
    *,
    mask_truncated: bool = False,
) -> Selection:
    """Keep the informative groups; with a KL, all that have a reward.

    `z` counts all prompts of the step, kept or not: dropped groups would have added 0 to the sum,
    so dropping them must not change the quotient. With `mask_truncated` no token is trained that
    only completions cut off for length have; their rewards stay in the baselines, and they in Z.
    This is a bias: what they would have taught is missing.
    """
    prompts: list[tuple[int, ...]] = []
    nodes: list[BatchNode] = []
    informative, dropped = [], []
    for group, credit in zip(scored, credits, strict=True):
        masked = _truncated(group.group) if mask_truncated else frozenset[int]()
        factors = _factors(group.group, masked)
        fresh = _batch_nodes(group, credit, objective, factors, len(prompts), len(nodes))
        informative.append(any((abs(node.coefficients) > NEGLIGIBLE).any() for node in fresh))
        dropped.append(_dropped(group, fresh, masked))
        if any(reason is None for reason in dropped[-1]):
            prompts.append(group.group.prompt_ids)
            nodes += fresh
    return Selection(Batch(tuple(prompts), tuple(nodes), z), tuple(informative), tuple(dropped))


def round_small(credit: Credit, least: float, uniforms: np.ndarray) -> Credit:
    """Round advantages smaller than `least` to it or to 0, at random and without bias.

        |A| < least:   A <- sign(A) least   with probability |A| / least,   else 0

    `uniforms` holds a number in (0, 1) per node. This saves computing updates from completions that
    would hardly change the policy.
    """

    def rounded(advantage: float | None, uniform: float) -> float | None:
        if advantage is None or abs(advantage) >= least:
            return advantage
        return float(np.copysign(least, advantage)) if uniform * least < abs(advantage) else 0.0

    pairs = zip(credit.advantages, uniforms, strict=True)
    return replace(credit, advantages=tuple(rounded(a, float(u)) for a, u in pairs))


def _truncated(group: Group) -> frozenset[int]:
    """Nodes of which every completion was cut off for length."""
    ends: dict[bool, set[int]] = {True: set(), False: set()}
    for leaf in group.leaves:
        ends[leaf.finish_reason == "length"].update(group.nodes_of(leaf))
    return frozenset(ends[True] - ends[False])


def _factors(group: Group, masked: Collection[int]) -> list[np.ndarray]:
    """Factor on each token's share, (n,) per node; 0 for the masked nodes."""
    factors = importance(group)
    for n in masked:
        factors[n] = 0 * factors[n]
    for leaf in group.leaves:
        if leaf.finish_reason == "loop":
            _silence_repetition(group, leaf.node, factors)
    return factors


def _silence_repetition(group: Group, end: int, factors: list[np.ndarray]) -> None:
    """Set the factors of a loop's tokens to 0, except for its first two periods."""
    path = group.path(end)
    start = repeated_from(np.concatenate([group.nodes[n].token_ids for n in path]))
    if start is None:
        return
    for n in path:
        length = len(group.nodes[n].token_ids)
        factors[n] = np.where(np.arange(length) < start, factors[n], 0.0)
        start -= length


def _dropped(
    scored: ScoredGroup, nodes: Sequence[BatchNode], masked: Collection[int]
) -> tuple[DropReason | None, ...]:
    """Reason each completion has nothing to train; None if it has."""
    group = scored.group
    reasons: list[DropReason | None] = []
    for leaf, reward in zip(group.leaves, scored.rewards, strict=True):
        if any(nodes[n].trained.any() for n in group.nodes_of(leaf)):
            reasons.append(None)
        elif reward is None:
            reasons.append("no reward")
        elif leaf.node in masked:
            reasons.append("truncated")
        else:
            reasons.append("no coefficient")
    return tuple(reasons)


def _batch_nodes(
    scored: ScoredGroup,
    credit: Credit,
    objective: Objective,
    factors: Sequence[np.ndarray],
    prompt: int,
    offset: int,
) -> list[BatchNode]:
    group = scored.group
    ends = {end for leaf in group.leaves for end in (leaf.node, *leaf.beside)}
    shares = token_shares(objective, group, credit)
    coefficients = token_coefficients(group, replace(credit, weights=shares))
    return [
        BatchNode(
            prompt=prompt,
            parent=node.parent + offset if node.parent >= 0 else -1,
            token_ids=node.token_ids,
            coefficients=_above_nothing(coefficients[n] * factors[n]),
            anchor_logprobs=anchor_logprobs(node),
            finish=n in ends,
            kl_weights=(node.sampled * factors[n] * (objective.kl_coef * shares[n])).astype(
                np.float32
            ),
        )
        for n, node in enumerate(group.nodes)
    ]


def _above_nothing(coefficients: np.ndarray) -> np.ndarray:
    """Return the coefficients as float32, with negligible ones set to 0."""
    return np.where(abs(coefficients) > NEGLIGIBLE, coefficients, 0.0).astype(np.float32)
