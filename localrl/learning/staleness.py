"""Staleness: what tokens of an earlier policy count for under the present one.

`old` is the policy at the start of the step, `sampled` the one that wrote the token. For tokens
that the policy itself has just written the two are one, and all of this is exactly neutral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.records import Group

TRUNCATION = 2.0
"""C: the most that a token of an earlier policy counts for."""
LARGEST_LOG = 20.0
"""Nats; beyond them a weight says nothing more, and its exponential would overflow."""


def importance(group: Group) -> list[np.ndarray]:
    """Prefix-cumulative weights, truncated: (n,) float64 per node.

        IS_t = min(exp(clip(sum over s <= t of (old_s - sampled_s), -20, 20)), C)

    The sum runs along the path from the root, so that fresh tokens behind a stale prefix have the
    prefix's weight. Exactly 1 without stale tokens. Cumulative rather than per token, because a
    token is trained in a context that the earlier policy chose (CTPO, arXiv 2605.07331).
    """
    sums: list[float] = []
    weights: list[np.ndarray] = []
    for node, log_ratio in zip(group.nodes, _log_ratios(group), strict=True):
        before = sums[node.parent] if node.parent >= 0 else 0.0
        along = before + np.cumsum(log_ratio)
        sums.append(float(along[-1]) if len(along) else before)
        weights.append(np.minimum(np.exp(np.clip(along, -LARGEST_LOG, LARGEST_LOG)), TRUNCATION))
    return weights


@dataclass(frozen=True)
class Drift:
    """How far the policy has moved from those that wrote a group, over its stale sampled tokens."""

    k3: float
    """Mean of rho - log rho - 1, rho = old / sampled probability: an estimate of the KL divergence,
    never negative."""
    mean_log: float
    """Mean log rho: by how many nats a token has become likelier."""


def drift(group: Group) -> Drift:
    """The group's drift, 0 without stale tokens; a log-ratio beyond 20 nats counts as 20."""
    stale = [
        np.clip(log_ratio, -LARGEST_LOG, LARGEST_LOG)[node.sampled]
        for node, log_ratio in zip(group.nodes, _log_ratios(group), strict=True)
        if node.old_logprobs is not None
    ]
    logs = np.concatenate(stale) if stale else np.zeros(0)
    if not len(logs):
        return Drift(0.0, 0.0)
    return Drift(float(np.mean(np.expm1(logs) - logs)), float(logs.mean()))


def too_far(group: Group, limit: float) -> bool:
    """Whether the group is of too different a policy to learn from.

    That is so when its mean K3 or its |mean log rho| is above `limit`, or either is no number.
    """
    found = drift(group)
    return not (found.k3 <= limit and abs(found.mean_log) <= limit)


def with_old_logprobs(group: Group, logprobs: Sequence[np.ndarray]) -> Group:
    """The group, written by an earlier policy, with each node's (n,) under the present one."""
    nodes = [
        replace(node, old_logprobs=old) for node, old in zip(group.nodes, logprobs, strict=True)
    ]
    return replace(group, nodes=tuple(nodes))


def _log_ratios(group: Group) -> list[np.ndarray]:
    """old - sampled in float64, (n,) per node; 0 for fresh tokens and those not sampled."""
    found = []
    for node in group.nodes:
        if node.old_logprobs is None:
            found.append(np.zeros(len(node.token_ids)))
            continue
        difference = np.subtract(node.old_logprobs, node.sampled_logprobs, dtype=np.float64)
        found.append(np.where(node.sampled, difference, 0.0))
    return found
