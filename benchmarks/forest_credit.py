"""Coefficients for thousands of forests at once: the package's credit, and recipes known as biased.

Shapes as in fork_task.py: N forests, K nodes. Column -1, which the parent index of a root selects,
stands for the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fork_task import Forests, ForkTask

Recipe = Callable[[ForkTask, Forests], np.ndarray]
"""From forests to one coefficient per node, (N, K)."""


def forest_values(forests: Forests) -> tuple[np.ndarray, np.ndarray]:
    """Nested values (N, K + 1), the prompt's own last, NaN if unknown; shares of parents (N, K)."""
    parent = forests.parent
    count, nodes = parent.shape
    forest = np.arange(count)
    planned = forests.cond_weight / np.where(parent < 0, forests.planned_roots, 1)
    values = np.concatenate([forests.reward, np.full((count, 1), np.nan)], axis=1)
    asked, present, total = np.zeros((3, count, nodes + 1))
    for n in [*reversed(range(nodes)), nodes]:
        inner = present[:, n] > 0
        values[inner, n] = (total[inner, n] / present[inner, n]) * asked[inner, n]
        if n < nodes:
            known, above = ~np.isnan(values[:, n]), (forest, parent[:, n])
            asked[above] += planned[:, n]
            present[above] += planned[:, n] * known
            total[above] += np.where(known, planned[:, n] * values[:, n], 0)
    above = forest[:, None], parent
    known = ~np.isnan(values[:, :-1])
    shares = planned * asked[above] / np.where(known, present[above], 1)
    return values, np.where(known, shares, 0)


def forest_credit(forests: Forests, *, kappa: float, prior: float) -> tuple[np.ndarray, np.ndarray]:
    """`localrl.learning.credit.assign_credit` for N forests at once.

    Returns advantages (N, K), NaN where that function has None, and weights (N, K). The tests hold
    the two together.
    """
    values, shares = forest_values(forests)
    values = values[:, :-1]
    count, nodes = values.shape
    known, filled = ~np.isnan(values), np.nan_to_num(values)
    forest = np.arange(count)
    sums, numbers = np.zeros((2, count, nodes + 1))
    for n in range(nodes):
        sums[forest, forests.parent[:, n]] += filled[:, n]
        numbers[forest, forests.parent[:, n]] += known[:, n]
    baselines = np.full((count, nodes + 1), prior if kappa > 0 else np.nan)
    weights = np.ones((count, nodes + 1))
    for n in range(nodes):
        above = forest, forests.parent[:, n]
        siblings = sums[above] - filled[:, n]
        number = numbers[above] - known[:, n]
        if kappa > 0:
            baselines[:, n] = (siblings + kappa * baselines[above]) / (number + kappa)
        else:
            mean = siblings / np.maximum(number, 1)
            baselines[:, n] = np.where(number > 0, mean, baselines[above])
        weights[:, n] = shares[:, n] * weights[above]
    advantages = values - baselines[:, :-1]
    return np.where(known, np.nan_to_num(advantages), np.nan), weights[:, :-1]


def shipped(kappa: float, shift: float = 0.0) -> Recipe:
    """The package's credit, with the true value plus `shift` as the tracker's."""

    def coefficients(task: ForkTask, forests: Forests) -> np.ndarray:
        advantages, weights = forest_credit(forests, kappa=kappa, prior=task.value + shift)
        return np.nan_to_num(advantages) * weights

    return coefficients


def own_leaves(task: ForkTask, forests: Forests) -> np.ndarray:
    """omega * (V(n) - V(parent)): the baseline contains the node's own leaves."""
    values, _ = forest_values(forests)
    _, weights = forest_credit(forests, kappa=0, prior=0)
    above = np.take_along_axis(values, forests.parent, axis=1)
    return np.nan_to_num(values[:, :-1] - above) * weights


def leaf_uniform(task: ForkTask, forests: Forests) -> np.ndarray:
    """Leave-one-out over leaves, every leaf with the same weight, however often its path forked."""
    advantages, number = _leave_one_out(forests)
    return _below(forests, advantages)[:, :-1] / number


def treepo(task: ForkTask, forests: Forests) -> np.ndarray:
    """Leaf-uniform with the advantage of TreePO (2508.17445), without its batch whitening.

    R minus the mean reward of the leaves below each ancestor with several, averaged over those.
    """
    leaf = ~np.isnan(forests.reward)
    numbers = _below(forests, leaf.astype(float))
    means = _below(forests, np.nan_to_num(forests.reward)) / np.maximum(numbers, 1)
    several = (numbers > 1).astype(float)
    path_sum, path_number = several * means, several.copy()
    forest = np.arange(len(leaf))
    for n in range(leaf.shape[1]):
        path_sum[:, n] += path_sum[forest, forests.parent[:, n]]
        path_number[:, n] += path_number[forest, forests.parent[:, n]]
    advantages = np.where(leaf, forests.reward - (path_sum / path_number)[:, :-1], 0)
    return _below(forests, advantages)[:, :-1] / numbers[:, -1:]


def treerl(task: ForkTask, forests: Forests) -> np.ndarray:
    """Leaf-uniform with the advantage of TreeRL (2506.11902).

    (2 V(n) - V(parent)) / sqrt(leaves below n), V being the mean of the leaves' leave-one-out
    rewards; a node is trained once for every leaf below it.
    """
    advantages, number = _leave_one_out(forests)
    numbers = _below(forests, (~np.isnan(forests.reward)).astype(float))
    values = _below(forests, advantages) / np.maximum(numbers, 1)
    above = np.take_along_axis(values, forests.parent, axis=1)
    return (2 * values[:, :-1] - above) * np.sqrt(numbers[:, :-1]) / number


def _leave_one_out(forests: Forests) -> tuple[np.ndarray, np.ndarray]:
    """Advantages (N, K) of the leaves, 0 elsewhere, and the number of leaves (N, 1)."""
    leaf = ~np.isnan(forests.reward)
    number = leaf.sum(axis=1, keepdims=True)
    mean = np.nansum(forests.reward, axis=1, keepdims=True) / number
    return np.where(leaf, forests.reward - mean, 0) * number / (number - 1), number


def _below(forests: Forests, leaves: np.ndarray) -> np.ndarray:
    """Sums over the leaves at or below each node, (N, K + 1) with the whole prompt last."""
    sums = np.concatenate([leaves, np.zeros((len(leaves), 1))], axis=1)
    forest = np.arange(len(leaves))
    for n in reversed(range(leaves.shape[1])):
        sums[forest, forests.parent[:, n]] += sums[:, n]
    return sums
