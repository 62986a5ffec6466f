"""Down-sampling: train on a few completions of a flat group, weighted to represent all of them.

Advantages come from *all* rewards of the group (`assign_credit` before down-sampling); each is then
multiplied by its completion's weight, which is 0 for dropped completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def max_variance(rewards: Sequence[float | None], keep: int, ties: np.ndarray) -> np.ndarray:
    """Return weights (n,) that keep the `keep` completions with maximal reward variance.

    Selection: the k lowest and the keep - k highest rewards, for the k of maximal variance, the
    smallest such k (PODS, Xu et al. 2025, 2504.13818); O(n log n). Among equal rewards the order of
    `ties`, (n,) uniform numbers, decides which are kept.

    Weights: the rewards fall into two strata, the low and the high side of the cut that maximises
    the variance between sides, N_low N_high (mean_high - mean_low)^2, over all cuts between
    different values (the lowest such cut). A kept completion has weight

        N_side / kept_side      (Horvitz and Thompson 1952)

    With two values each is a side, and the weight is 1 over the probability of being kept: given
    the rewards, E[sum_i w_i A_i g_i] over `ties` is sum_i A_i g_i for any advantages A and any g.
    With more values the weights only correct for the counts of the two sides: within a side the
    extreme rewards are kept and the middle ones are not, and the sum is biased toward extremes.

    Neither side ever loses all of its completions: the lowest and the highest reward are kept. If
    variance cannot decide (equal rewards, or `keep` 1), the lowest `ties` are kept with weight
    N / keep, regardless of their rewards; this is unbiased too.

    A reward of None has weight 0 and does not count. If `keep` is 0, or at least the number of
    known rewards, all of these have weight 1.
    """
    known = np.array([reward is not None for reward in rewards], bool)
    values = np.array([reward for reward in rewards if reward is not None], float)
    weights = np.zeros(len(rewards))
    weights[known] = _weights(values, keep, ties[known])
    return weights


def _weights(values: np.ndarray, keep: int, ties: np.ndarray) -> np.ndarray:
    if keep == 0 or keep >= len(values):
        return np.ones(len(values))
    if keep == 1 or values.min() == values.max():
        kept = np.argsort(ties)[:keep]
        side = np.zeros(len(values), int)
    else:
        order = np.lexsort((ties, values))
        # In units of the range, so that sums of two-valued rewards are exact and ties stay ties.
        units = (values[order] - values.min()) / (values.max() - values.min())
        kept = order[_extremes(units, keep)]
        side = (values >= values[order[_cut(units)]]).astype(int)
    weights = np.zeros(len(values))
    weights[kept] = (np.bincount(side) / np.bincount(side[kept]))[side[kept]]
    return weights


def _extremes(ascending: np.ndarray, keep: int) -> np.ndarray:
    """Positions of the k lowest and keep - k highest values, for the k of maximal variance."""
    count, low = len(ascending), np.arange(keep + 1)
    first = count - keep + low
    sums, squares = _cumulated(ascending), _cumulated(ascending**2)
    total = sums[low] + sums[count] - sums[first]
    spread = keep * (squares[low] + squares[count] - squares[first]) - total**2
    best = int(spread.argmax())
    return np.r_[:best, first[best] : count]


def _cut(ascending: np.ndarray) -> int:
    """Position of the lowest value of the high side; the values are not all equal."""
    count, low = len(ascending), np.arange(1, len(ascending))
    sums = _cumulated(ascending)
    apart = (sums[count] - sums[low]) / (count - low) - sums[low] / low
    between = np.where(np.diff(ascending) > 0, low * (count - low) * apart**2, -1)
    return int(low[between.argmax()])


def _cumulated(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... n values, (n + 1,)."""
    return np.concatenate([[0.0], np.cumsum(values)])
