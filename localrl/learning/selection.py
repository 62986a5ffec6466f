"""Selection: which rollouts reach the optimizer, and the batch that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.learning.credit import Credit, token_coefficients
from localrl.learning.objectives import Objective, token_shares
from localrl.records import Batch, BatchNode, ScoredGroup

NEGLIGIBLE = 1e-8
"""A coefficient this small teaches nothing."""


@dataclass(frozen=True)
class Selection:
    """The batch of a step, and what was left out of it."""

    batch: Batch
    informative: tuple[bool, ...]
    """Per group: whether some coefficient is more than negligible."""
    kept: tuple[bool, ...]
    """Per group: whether it is in the batch; with a KL also without a coefficient."""

    def reason(self, group: int) -> str | None:
        """Why this group was dropped, or None if it was kept."""
        return None if self.kept[group] else "no coefficient above 0"


def select(
    scored: Sequence[ScoredGroup], credits: Sequence[Credit], z: float, objective: Objective
) -> Selection:
    """Keep the groups that have something to teach; with a KL, all that have a reward.

    `z` counts all prompts of the step, kept or not: what is dropped would have added 0 to the sum,
    so dropping it must not change the quotient.
    """
    prompts: list[tuple[int, ...]] = []
    nodes: list[BatchNode] = []
    informative, kept = [], []
    for group, credit in zip(scored, credits, strict=True):
        fresh = _batch_nodes(group, credit, objective, prompt=len(prompts), offset=len(nodes))
        teaches = any((abs(node.coefficients) > NEGLIGIBLE).any() for node in fresh)
        informative.append(teaches)
        kept.append(teaches or any(node.kl_weights.any() for node in fresh))
        if kept[-1]:
            prompts.append(group.group.prompt_ids)
            nodes += fresh
    return Selection(Batch(tuple(prompts), tuple(nodes), z), tuple(informative), tuple(kept))


def _batch_nodes(
    scored: ScoredGroup, credit: Credit, objective: Objective, *, prompt: int, offset: int
) -> list[BatchNode]:
    group = scored.group
    ends = {leaf.node for leaf in group.leaves}
    shares = token_shares(objective, group, credit)
    coefficients = token_coefficients(group, replace(credit, weights=shares))
    return [
        BatchNode(
            prompt=prompt,
            parent=node.parent + offset if node.parent >= 0 else -1,
            token_ids=node.token_ids,
            coefficients=coefficients[n],
            sampled_logprobs=node.sampled_logprobs,
            finish=n in ends,
            kl_weights=(node.sampled * (objective.kl_coef * shares[n])).astype(np.float32),
        )
        for n, node in enumerate(group.nodes)
    ]
