"""Fork rules, which see only the tokens generated so far.

A decision that depends on the future of its path, or on the next token drawn, would bias the
gradient; a `LiveView` contains neither. A rule applies what it learns from a batch from the next
batch on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localrl.records import Group, mean_or_none
from localrl.rollouts.decode import LiveView
from localrl.rollouts.groups import Shape
from localrl.settings import RolloutConfig

FIRST_TOKENS = 4
"""Minimum length of a path before it forks: earlier forks would share almost nothing."""
SHORTEST_GAP = 4
"""Minimum number of tokens between two forks of a path."""
MEMORY = 0.7
"""Weight of the old estimate when a new batch is seen."""
QUANTILES = (0.5, 0.99)
NUDGE = 0.02


@dataclass
class Spacing:
    """The spacing and number of forks, shared by both rules.

    Forks become available along the expected length of a path, so they are not all used at its
    start; those of a path are at least a fifth of its expected length apart.
    """

    roots: int
    leaves: int
    expected_length: float

    @property
    def target(self) -> float:
        """Number of forks on each path of a full, balanced tree."""
        return math.log2(self.leaves / self.roots)

    def open(self, view: LiveView) -> np.ndarray:
        """Return the rows that the spacing allows to fork, (B,) bool."""
        expected = np.where(np.isnan(view.expected), self.expected_length, view.expected)
        gap = np.maximum(SHORTEST_GAP, expected / 5)
        most = math.ceil(self.target) + 1
        unlocked = np.minimum(most, 1 + np.floor(most * view.lengths / expected))
        spaced = (view.since_fork >= gap) | (view.forks == 0)
        return view.alive & (view.lengths >= FIRST_TOKENS) & spaced & (view.forks < unlocked)

    def learn(self, groups: Sequence[Group]) -> None:
        """Update the expected path length from the mean of a finished batch."""
        lengths = [len(path) for group in groups for path in group.completions()]
        self.expected_length = _follow(self.expected_length, float(np.mean(lengths)))


@dataclass
class EntropyRule:
    """Forks where the model is uncertain: above a running quantile of earlier batches' entropies.

    The quantile is adjusted until paths have as many forks as a balanced tree. Nothing forks in the
    first batch, since there is no threshold yet.
    """

    spacing: Spacing
    quantile: float = 0.9
    threshold: float | None = None
    """Entropy in nats above which a path may fork; None before the first batch."""

    def choose(self, view: LiveView) -> np.ndarray:
        """Choose rows above the threshold, the most uncertain of each tree first."""
        if self.threshold is None:
            return np.zeros(len(view.alive), bool)
        wanted = self.spacing.open(view) & (view.entropies > self.threshold)
        return within_budget(wanted, view.entropies, view)

    def learn(self, groups: Sequence[Group]) -> None:
        """Update the threshold from the entropies and the number of forks of a finished batch."""
        self.spacing.learn(groups)
        forks = forks_per_path(groups)
        if self.threshold is not None and forks is not None:
            step = NUDGE if forks > self.spacing.target else -NUDGE
            self.quantile = float(np.clip(self.quantile + step, *QUANTILES))
        entropies = np.concatenate([n.entropies[n.sampled] for g in groups for n in g.nodes])
        if len(entropies):
            seen = float(np.quantile(entropies, self.quantile))
            self.threshold = seen if self.threshold is None else _follow(self.threshold, seen)


@dataclass
class PeriodicRule:
    """Forks at random once the gap has passed, regardless of entropy."""

    spacing: Spacing
    chance: float = 0.5

    def choose(self, view: LiveView) -> np.ndarray:
        """Choose rows by their random number, the smallest of each tree first."""
        wanted = self.spacing.open(view) & (view.coins < self.chance)
        return within_budget(wanted, -view.coins, view)

    def learn(self, groups: Sequence[Group]) -> None:
        """Update the expected path length."""
        self.spacing.learn(groups)


def make_rule(config: RolloutConfig, shape: Shape) -> EntropyRule | PeriodicRule | None:
    """Build the configured rule in its initial state; None if nothing may fork."""
    if shape.leaves == shape.roots:
        return None
    # Half of the longest completion, until the first batch gives a better estimate.
    expected = config.max_completion_tokens / 2
    spacing = Spacing(shape.roots, shape.leaves, expected)
    return EntropyRule(spacing) if config.fork_rule == "entropy" else PeriodicRule(spacing)


def within_budget(wanted: np.ndarray, priority: np.ndarray, view: LiveView) -> np.ndarray:
    """Limit the wanted rows to each tree's remaining leaves, highest priority first; (B,) bool."""
    chosen = np.zeros(len(wanted), bool)
    rows = np.flatnonzero(wanted)
    for tree in np.unique(view.trees[rows]):
        mine = rows[view.trees[rows] == tree]
        best = mine[np.argsort(-priority[mine], kind="stable")]
        chosen[best[: view.leaves_left[mine[0]]]] = True
    return chosen


def forks_per_path(groups: Sequence[Group]) -> float | None:
    """Mean number of forks between root and leaf; the end of a reused prefix is not a fork."""
    paths = [(g, g.path(leaf.node)) for g in groups for leaf in g.leaves]
    return mean_or_none([sum(g.nodes[n].cond_weight < 1 for n in path) for g, path in paths])


def _follow(old: float, new: float) -> float:
    return MEMORY * old + (1 - MEMORY) * new
