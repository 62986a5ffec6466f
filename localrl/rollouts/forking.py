"""Where paths fork: rules that see only what has been generated so far.

A decision that looks at the future of its path, or at the token drawn next, would bias the
gradient; a `LiveView` holds neither. What a rule learns from a batch it uses from the next on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localrl.config import RolloutConfig
from localrl.records import Group, mean_or_none
from localrl.rollouts.decode import LiveView
from localrl.rollouts.groups import Shape

FIRST_TOKENS = 4
"""No path forks before it has this many tokens: there, a fork shares almost nothing."""
SHORTEST_GAP = 8
MEMORY = 0.7
"""Share of what was learned that stays when a new batch is seen."""
QUANTILES = (0.5, 0.99)
NUDGE = 0.02


@dataclass
class Spacing:
    """How far apart forks are, and how many; the half that both rules share.

    Forks unlock along the expected length of a path, so that they are not all spent at its start.
    """

    roots: int
    leaves: int
    gap: int
    """Tokens between two forks of a path; 0: a fifth of the expected length, at least 8."""
    expected_length: float

    @property
    def target(self) -> float:
        """Forks of a path in a tree that is full and even."""
        return math.log2(self.leaves / self.roots)

    def open(self, view: LiveView) -> np.ndarray:
        """(B,) bool: rows that may fork as far as spacing goes."""
        expected = np.where(np.isnan(view.expected), self.expected_length, view.expected)
        gap = self.gap or np.maximum(SHORTEST_GAP, expected / 5)
        most = math.ceil(self.target) + 1
        unlocked = np.minimum(most, 1 + np.floor(most * view.lengths / expected))
        spaced = (view.since_fork >= gap) | (view.forks == 0)
        return view.alive & (view.lengths >= FIRST_TOKENS) & spaced & (view.forks < unlocked)

    def learn(self, groups: Sequence[Group]) -> None:
        """Follow the mean length of paths."""
        lengths = [len(path) for group in groups for path in group.completions()]
        self.expected_length = _follow(self.expected_length, float(np.mean(lengths)))


@dataclass
class EntropyRule:
    """Fork where the model is uncertain: above a running quantile of earlier batches' entropies.

    The quantile is nudged until paths have as many forks as an even tree. In the first batch, with
    nothing to compare with, nothing forks.
    """

    spacing: Spacing
    quantile: float = 0.9
    threshold: float | None = None
    """Nats."""

    def choose(self, view: LiveView) -> np.ndarray:
        """Rows above the threshold, the most uncertain of each tree first."""
        if self.threshold is None:
            return np.zeros(len(view.alive), bool)
        wanted = self.spacing.open(view) & (view.entropies > self.threshold)
        return within_budget(wanted, view.entropies, view)

    def learn(self, groups: Sequence[Group]) -> None:
        """Follow the entropies and the number of forks of a finished batch."""
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
    """The control: fork when the gap has passed and a coin says so, whatever the entropy."""

    spacing: Spacing
    chance: float = 0.5

    def choose(self, view: LiveView) -> np.ndarray:
        """Rows whose coin falls right, the luckiest of each tree first."""
        wanted = self.spacing.open(view) & (view.coins < self.chance)
        return within_budget(wanted, -view.coins, view)

    def learn(self, groups: Sequence[Group]) -> None:
        """Follow the length of paths."""
        self.spacing.learn(groups)


def make_rule(config: RolloutConfig, shape: Shape) -> EntropyRule | PeriodicRule | None:
    """The configured rule as it is before the first batch; None where nothing may fork."""
    if shape.leaves == shape.roots:
        return None
    # Half of the longest completion, until the first batch has shown better.
    expected = config.max_completion_tokens / 2
    spacing = Spacing(shape.roots, shape.leaves, config.fork_gap, expected)
    return EntropyRule(spacing) if config.fork_rule == "entropy" else PeriodicRule(spacing)


def within_budget(wanted: np.ndarray, priority: np.ndarray, view: LiveView) -> np.ndarray:
    """(B,) bool: of the wanted rows, as many of each tree as it has leaves left, highest first."""
    chosen = np.zeros(len(wanted), bool)
    rows = np.flatnonzero(wanted)
    for tree in np.unique(view.trees[rows]):
        mine = rows[view.trees[rows] == tree]
        best = mine[np.argsort(-priority[mine], kind="stable")]
        chosen[best[: view.leaves_left[mine[0]]]] = True
    return chosen


def forks_per_path(groups: Sequence[Group]) -> float | None:
    """Mean number of forks between root and leaf; the end of a reused prefix is none."""
    paths = [(g, g.path(leaf.node)) for g in groups for leaf in g.leaves]
    return mean_or_none([sum(g.nodes[n].cond_weight < 1 for n in path) for g, path in paths])


def _follow(old: float, new: float) -> float:
    return MEMORY * old + (1 - MEMORY) * new
