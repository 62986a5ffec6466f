"""The tracker: what a prompt's completions have been worth so far, known before the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from localrl.learning.credit import Credit
from localrl.records import ScoredGroup

KEPT = 0.9
"""Share of what is known of a prompt that stays when it is seen again."""
PRIOR_SAMPLES = 1.0
"""Completions that the mean of all prompts counts for, where a prompt has been seen little."""


@dataclass
class Tracker:
    """A running mean reward per `tracker_key`, drawn toward that of all prompts.

        total <- 0.9 total + 0.1 * mean of all + samples * mean reward of the group
        count <- 0.9 count + 0.1 + samples,      value = total / count

    The rule is the discounted Beta posterior of Qu et al. 2025 (MoPPS, arXiv 2507.04632), written
    as a mean, which rewards of any size fit. Completions that share tokens are correlated: a group
    counts as its roots and half of its further leaves.
    """

    _known: dict[str, tuple[float, float]] = field(default_factory=dict)
    _all: tuple[float, float] = (0.0, 0.0)

    def value(self, key: str) -> float | None:
        """Expected reward of the prompt; None while no reward at all has been seen."""
        if not self._all[1]:
            return None
        total, count = self._known.get(key, (self._mean * PRIOR_SAMPLES, PRIOR_SAMPLES))
        return total / count

    def update(self, scored: Sequence[ScoredGroup], credits: Sequence[Credit]) -> None:
        """Take in a step's rewards, weighted as the credit weighs its leaves."""
        for group, credit in zip(scored, credits, strict=True):
            mean, samples = _worth(group, credit)
            if samples:
                self._learn(group.group.example.tracker_key, mean, samples)

    def _learn(self, key: str, mean: float, samples: float) -> None:
        old = self._known.get(key, (self._mean * PRIOR_SAMPLES, PRIOR_SAMPLES))
        prior = (1 - KEPT) * PRIOR_SAMPLES
        total = KEPT * old[0] + prior * self._mean + samples * mean
        self._known[key] = total, KEPT * old[1] + prior + samples
        # A hundred groups or so: slow enough to be steady, fast enough to follow the policy.
        self._all = 0.99 * self._all[0] + samples * mean, 0.99 * self._all[1] + samples

    @property
    def _mean(self) -> float:
        total, count = self._all
        return total / count if count else 0.0


def _worth(scored: ScoredGroup, credit: Credit) -> tuple[float, float]:
    """Weighted mean reward of a group, and how many independent completions it counts for."""
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
