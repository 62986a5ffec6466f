"""Hand-made groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrl.learning.credit import with_expected_reward
from localrl.records import Example, Group, Leaf, Node, ScoredGroup


def node(parent: int, tokens: Sequence[int], sampled: Sequence[bool], weight: float = 1.0) -> Node:
    mask = np.array(sampled)
    return Node(
        parent=parent,
        token_ids=np.array(tokens, np.int32),
        sampled=mask,
        sampled_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        entropies=np.where(mask, 0.5, 0.0).astype(np.float32),
        cond_weight=weight,
    )


def forest(
    parents: Sequence[int],
    leaves: Sequence[int],
    planned_roots: int,
    tokens: int = 3,
    cond_weights: Sequence[float] | None = None,
) -> Group:
    """Nodes of `tokens` tokens; children of one parent are drawn alike unless said otherwise."""
    alike = [1.0 if parent < 0 else 1 / list(parents).count(parent) for parent in parents]
    weights = cond_weights or alike
    nodes = tuple(
        node(parent, range(4 + n, 4 + n + tokens), [True] * tokens, weights[n])
        for n, parent in enumerate(parents)
    )
    return Group(
        example=Example(id="hand-made", messages=({"role": "user", "content": "12"},)),
        prompt_ids=(1, 5, 6, 2),
        nodes=nodes,
        leaves=tuple(Leaf(n, "stop", "") for n in leaves),
        planned_roots=planned_roots,
    )


def flat_group(size: int, sampled: Sequence[bool] = (True, True, True)) -> Group:
    """`size` completions of as many tokens as `sampled` has entries."""
    group = forest([-1] * size, list(range(size)), size, tokens=len(sampled))
    nodes = tuple(node(-1, n.token_ids.tolist(), sampled) for n in group.nodes)
    return Group(group.example, group.prompt_ids, nodes, group.leaves, size)


def scored(
    group: Group, rewards: Sequence[float | None], expected: float | None = None
) -> ScoredGroup:
    """The group with these rewards, of which the tracker expected this much."""
    group = with_expected_reward(group, expected)
    return ScoredGroup(group, tuple(rewards), {"hand": tuple(rewards)})
