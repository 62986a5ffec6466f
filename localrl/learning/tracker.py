"""The tracker: running reward statistics per prompt, available before the next completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from localrl.learning.credit import Credit
from localrl.records import ScoredGroup, mean_or_none

HALF_LIFE = 0.06
"""Drift in nats after which old rewards count half."""
KEPT = (0.875, 0.96)
"""Minimum and maximum retention when a prompt is seen again: the last 8 to 25 visits count."""
PRIOR_SAMPLES = 2.0
"""Weight of the mean over all prompts, in completions, for prompts rarely seen."""
KEPT_OF_ALL = 0.99
"""Retention of the mean over all prompts, per group: stable, yet fast enough for the policy."""
FLOOR = 0.05
"""Minimum parameter of a posterior, so that it never becomes certain."""


@dataclass
class PromptStats:
    """The running statistics of one prompt, or of all of them."""

    total: float
    """Sum of rewards, with old ones decayed."""
    count: float
    """Number of completions in that sum."""
    tokens: float
    """Sum of their lengths in tokens."""
    clock: float
    """Cumulative drift of the policy at the last visit, in nats."""


@dataclass
class Tracker:
    """A running mean reward per `tracker_key`, shrunk toward the mean of all prompts.

        total <- kept total + (1 - kept) prior * mean of all + samples * mean reward of the group
        count <- kept count + (1 - kept) prior + samples,         value = total / count
        kept = 2^(-drift / 0.06) within 0.875 and 0.96

    drift is the policy's movement since the prompt's last visit: the sum over updates of the mean
    |change of log-probability|. The decay is that of Xu and Ding 2025 (single-stream policy
    optimization, arXiv 2509.13232), who measure drift on the prompt's last completion; the prior is
    that of Qu et al. 2025 (MoPPS, arXiv 2507.04632). For rewards of 0 and 1 total and count - total
    are a Beta posterior; others are scaled to the range seen so far. Completions that share tokens
    are correlated: a group counts as its roots plus half of its other leaves.
    """

    _known: dict[str, PromptStats] = field(default_factory=dict)
    _all: PromptStats = field(default_factory=lambda: PromptStats(0.0, 0.0, 0.0, 0.0))
    _range: tuple[float, float] = (0.0, 1.0)

    def value(self, key: str) -> float | None:
        """Expected reward of the prompt; None until any reward has been seen."""
        if not self._all.count:
            return None
        known = self._of(key)
        return known.total / known.count

    def expected_tokens(self, key: str) -> float | None:
        """Expected length of a completion; None until one has been seen."""
        known = self._of(key)
        return known.tokens / known.count if known.count else None

    def posterior(self, key: str) -> tuple[float, float]:
        """Parameters of the Beta distribution of the prompt's success rate."""
        known = self._of(key)
        place = self.place(known.total / known.count) if known.count else 0.5
        count = known.count or PRIOR_SAMPLES
        return max(FLOOR, count * place), max(FLOOR, count * (1 - place))

    def drifted(self, nats: float) -> None:
        """Record that the policy has moved by this much."""
        self._all.clock += nats

    def update(self, scored: Sequence[ScoredGroup], credits: Sequence[Credit]) -> None:
        """Add a step's rewards, weighted as the credit weighs its leaves."""
        for group, credit in zip(scored, credits, strict=True):
            mean, samples = _worth(group, credit)
            if samples:
                lengths = [int(path.sampled.sum()) for path in group.group.completions()]
                length = mean_or_none(lengths) or 0.0
                self._see([reward for reward in group.rewards if reward is not None])
                self._learn(group.group.example.tracker_key, mean, length, samples)

    def _learn(self, key: str, mean: float, length: float, samples: float) -> None:
        old, prior, overall = self._of(key), self._prior(), self._all
        kept = float(np.clip(2 ** (-(overall.clock - old.clock) / HALF_LIFE), *KEPT))
        self._known[key] = PromptStats(
            kept * old.total + (1 - kept) * prior.total + samples * mean,
            kept * old.count + (1 - kept) * prior.count + samples,
            kept * old.tokens + (1 - kept) * prior.tokens + samples * length,
            overall.clock,
        )
        overall.total = KEPT_OF_ALL * overall.total + samples * mean
        overall.count = KEPT_OF_ALL * overall.count + samples
        overall.tokens = KEPT_OF_ALL * overall.tokens + samples * length

    def _of(self, key: str) -> PromptStats:
        return self._known.get(key) or self._prior()

    def _prior(self) -> PromptStats:
        """Statistics of an unseen prompt: the mean of all, weighted as a few completions."""
        overall = self._all
        if not overall.count:
            return PromptStats(0.0, 0.0, 0.0, overall.clock)
        weight = PRIOR_SAMPLES / overall.count
        return PromptStats(
            weight * overall.total, PRIOR_SAMPLES, weight * overall.tokens, overall.clock
        )

    def _see(self, rewards: Sequence[float]) -> None:
        low, high = self._range
        self._range = min(low, *rewards), max(high, *rewards)

    def place(self, reward: float) -> float:
        """Scale a reward to the range seen so far, 0 to 1."""
        low, high = self._range
        return float(np.clip((reward - low) / (high - low), 0.0, 1.0))


def _worth(scored: ScoredGroup, credit: Credit) -> tuple[float, float]:
    """Weighted mean reward of a group, and the number of independent completions it counts as."""
    leaves = [
        (credit.weights[leaf.node], reward)
        for leaf, reward in zip(scored.group.leaves, scored.rewards, strict=True)
        if reward is not None
    ]
    weight = sum(share for share, _ in leaves)
    if not weight:
        return 0.0, 0.0
    roots = sum(node.parent < 0 for node in scored.group.nodes)
    samples = min(len(leaves), roots + (len(leaves) - roots) / 2)
    return sum(share * reward for share, reward in leaves) / weight, samples
