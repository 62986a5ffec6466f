"""Staleness: the weight of an earlier policy's tokens under the current policy.

`old` is the policy at the start of the step, `written` the one that wrote the token. For freshly
sampled tokens the two are the same, and every weight here is exactly neutral. In 16 bits rounding
makes the sampler's record differ from a forward pass of the same policy; `written` then comes from
such a pass (`Node.written_logprobs`), so that an unchanged policy is not taken for another one, and
log-ratios are shrunk by the share of their mean square that rounding explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localrl.records import Group, Node
from localrl.utils.rounding import beyond_rounding

TRUNCATION = 2.0
"""C: maximum weight of a token of an earlier policy."""
LARGEST_LOG = 20.0
"""Clip for log-ratios, in nats; larger ones carry no information and exp would overflow."""


def importance(group: Group) -> list[np.ndarray]:
    """Compute truncated prefix-cumulative weights, (n,) float64 per node.

        IS_t = min(exp(clip(sum over s <= t of (old_s - written_s), -20, 20)), C)

    The sum runs along the path from the root, so fresh tokens after a stale prefix get the prefix's
    weight. It is exactly 1 without stale tokens. Weights are cumulative rather than per token
    because a token is trained in a context that the earlier policy chose (CTPO, arXiv 2605.07331).
    """
    sums: list[float] = []
    weights: list[np.ndarray] = []
    for node, log_ratio in zip(group.nodes, _log_ratios(group), strict=True):
        before = sums[node.parent] if node.parent >= 0 else 0.0
        along = before + np.cumsum(log_ratio)
        sums.append(float(along[-1]) if len(along) else before)
        weights.append(np.minimum(np.exp(np.clip(along, -LARGEST_LOG, LARGEST_LOG)), TRUNCATION))
    return weights


def with_scored_logprobs(group: Group, logprobs: Sequence[np.ndarray]) -> Group:
    """Set `scored_logprobs` (n,) of the fresh nodes of a group that was just sampled."""
    nodes = [
        node if node.old_logprobs is not None else replace(node, scored_logprobs=scored)
        for node, scored in zip(group.nodes, logprobs, strict=True)
    ]
    return replace(group, nodes=tuple(nodes))


def anchor_logprobs(node: Node) -> np.ndarray:
    """Return the log-probabilities (n,) that the update's first pass is corrected for.

        fresh: sampled      stale: old + (sampled - written)

    `importance` corrects a stale token from `written` to `old`. The rest, from the sampler's
    rounding to a forward pass's, is the same correction as a fresh token's; the term is 0 where
    no such pass was recorded.
    """
    if node.old_logprobs is None:
        return node.sampled_logprobs
    if node.scored_logprobs is None:
        return node.old_logprobs
    return node.sampled_logprobs + (node.old_logprobs - node.scored_logprobs)


def _log_ratios(group: Group) -> list[np.ndarray]:
    """Log-ratios old - written, (n,) float64 per node; 0 for fresh and for unsampled tokens.

    Where the rounding of the nodes' tokens is known they are shrunk, all by the same factor: the
    least-squares estimate of their movement alone.
    """
    found = []
    for node in group.nodes:
        if node.old_logprobs is None:
            found.append(np.zeros(len(node.token_ids)))
            continue
        difference = np.subtract(node.old_logprobs, node.written_logprobs, dtype=np.float64)
        found.append(np.where(node.sampled, difference, 0.0))
    return _without_rounding(group, found)


def _without_rounding(group: Group, log_ratios: list[np.ndarray]) -> list[np.ndarray]:
    """Shrink the log-ratios of stale nodes whose tokens' rounding is known."""
    known = [None if node.old_logprobs is None else node.rounding for node in group.nodes]
    pairs = [(d, r) for d, r in zip(log_ratios, known, strict=True) if r is not None]
    if not pairs:
        return log_ratios
    share = beyond_rounding(
        sum(float(d @ d) for d, _ in pairs), sum(float(r @ r) for _, r in pairs)
    )
    return [d if r is None else share * d for d, r in zip(log_ratios, known, strict=True)]
