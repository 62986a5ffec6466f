"""Credit assignment: one advantage and one weight per node, from the rewards of a forest.

Each token's coefficient is its node's weight times its node's advantage. On a flat group with
kappa 0 the advantage is the reward minus the mean of the other rewards (leave-one-out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.records import Group, ScoredGroup


@dataclass(frozen=True)
class Credit:
    """One number per node of a group."""

    advantages: tuple[float | None, ...]
    """Value minus baseline; None if no completion below the node has a reward."""
    weights: tuple[float, ...]
    """omega, a node's share of its prompt. Roots sum to 1 and children to their parent."""

    def coefficient(self, node: int) -> float:
        """Weight times advantage; 0 if the advantage is unknown."""
        return self.weights[node] * (self.advantages[node] or 0.0)


def assign_credit(scored: ScoredGroup, *, kappa: float = 0.0) -> Credit:
    """Compute nested values, sibling baselines shrunk toward the parent's, and split weights.

        V(n) = reward of a leaf, else the weighted mean of the children's V
        b(n) = (sum of the siblings' V + kappa * b(parent)) / (siblings + kappa)
        A(n) = V(n) - b(n),   omega(n) = omega(parent) * cond_weight(n)

    Roots have weight 1 / planned_roots. The baseline above each is its own `expected_reward`, from
    before its tokens were drawn: a root of an earlier step must not be compared with what has been
    learned from it since. Where nothing was expected, kappa is 0 for the root and all below it.

    If roots are sampled in rounds, those of later rounds do not count as siblings of earlier ones,
    since whether they were sampled at all depended on the earlier ones. By Wald's identity the sum
    is then E[roots sampled] / planned_roots times the gradient, for any rule that decides from the
    past.

    A leaf without a reward is left out and the weights of its siblings are scaled to compensate.
    With kappa 0 a node without siblings (a survivor of pruning) takes its parent's baseline, and a
    root without siblings has none, hence advantage 0 for it and for such nodes below it.

    Sequences beside a completion (`Leaf.beside`) have its root's advantage and weight.
    """
    group = scored.group
    children = _children(group)
    shares = _shares(group, children, scored)
    values = _values(group, children, scored, shares)
    baselines: list[float | None] = []
    kappas: list[float] = []
    advantages: list[float | None] = []
    weights: list[float] = []
    for n, node in enumerate(group.nodes):
        if node.parent >= 0:
            above, own_kappa = baselines[node.parent], kappas[node.parent]
        else:
            above = node.expected_reward if kappa > 0 else None
            own_kappa = 0.0 if above is None else kappa
        siblings = [k for k in children[node.parent] if k != n and _known_to(group, k, n)]
        baseline = _baseline([values[k] for k in siblings], above, own_kappa)
        baselines.append(baseline)
        kappas.append(own_kappa)
        advantages.append(_difference(values[n], baseline))
        weights.append(shares[n] * (weights[node.parent] if node.parent >= 0 else 1.0))
    for leaf in group.leaves:
        root = group.path(leaf.node)[0]
        for n in (n for end in leaf.beside for n in group.path(end)):
            advantages[n], weights[n] = advantages[root], weights[root]
    return Credit(tuple(advantages), tuple(weights))


def with_expected_reward(group: Group, expected: float | None) -> Group:
    """Set the `expected_reward` of the roots just drawn; those of earlier steps keep theirs."""
    nodes = (
        node
        if node.parent >= 0 or node.old_logprobs is not None
        else replace(node, expected_reward=expected)
        for node in group.nodes
    )
    return replace(group, nodes=tuple(nodes))


def token_coefficients(group: Group, credit: Credit) -> list[np.ndarray]:
    """Coefficient of every token, (n,) float32 per node; 0 for tokens the model did not write."""
    return [
        np.where(node.sampled, credit.coefficient(n), 0.0).astype(np.float32)
        for n, node in enumerate(group.nodes)
    ]


def _children(group: Group) -> dict[int, list[int]]:
    """Children of each node; the roots are the children of -1."""
    children: dict[int, list[int]] = {n: [] for n in range(-1, len(group.nodes))}
    for n, node in enumerate(group.nodes):
        children[node.parent].append(n)
    return children


def _known_to(group: Group, other: int, node: int) -> bool:
    """Return True if `other` may enter the node's baseline: it is not from a later round."""
    return group.nodes[other].round <= group.nodes[node].round


def _rewards(scored: ScoredGroup) -> dict[int, float | None]:
    leaves = zip(scored.group.leaves, scored.rewards, strict=True)
    return {leaf.node: reward for leaf, reward in leaves}


def _shares(group: Group, children: dict[int, list[int]], scored: ScoredGroup) -> list[float]:
    """Each node's share of its parent, after leaving out nodes without any reward."""
    rewards = _rewards(scored)
    known = [False] * len(group.nodes)
    for n in reversed(range(len(group.nodes))):
        known[n] = rewards.get(n) is not None or any(known[k] for k in children[n])
    shares = [0.0] * len(group.nodes)
    for parent, family in children.items():
        planned = [_planned(group, k, parent) for k in family]
        present = sum(share for k, share in zip(family, planned, strict=True) if known[k])
        for k, share in zip(family, planned, strict=True):
            shares[k] = share * sum(planned) / present if known[k] else 0.0
    return shares


def _planned(group: Group, node: int, parent: int) -> float:
    weight = group.nodes[node].cond_weight
    return weight / group.planned_roots if parent < 0 else weight


def _baseline(siblings: Sequence[float | None], above: float | None, kappa: float) -> float | None:
    """The siblings' mean, shrunk toward the baseline above; None if neither exists."""
    known = [value for value in siblings if value is not None]
    if kappa == 0 or above is None:
        return sum(known) / len(known) if known else above
    return (sum(known) + kappa * above) / (len(known) + kappa)


def _difference(value: float | None, baseline: float | None) -> float | None:
    """Value minus baseline; 0 without a baseline, None without a value."""
    if value is None or baseline is None:
        return None if value is None else 0.0
    return value - baseline


def _values(
    group: Group,
    children: dict[int, list[int]],
    scored: ScoredGroup,
    shares: Sequence[float],
) -> list[float | None]:
    values: list[float | None] = [None] * len(group.nodes)
    rewards = _rewards(scored)
    for n in reversed(range(len(group.nodes))):
        family = [(shares[k], values[k]) for k in children[n]]
        known = [(share, value) for share, value in family if value is not None]
        if known:
            values[n] = sum(share * value for share, value in known)
        else:
            values[n] = rewards.get(n)
    return values
