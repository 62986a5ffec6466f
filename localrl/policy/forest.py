"""Scoring a forest: the prompt and every node computed once, children attending to ancestors.

Level by level: prompts, roots, their children, and so on. A level's keys and values are those of
its rows' parents, gathered, and its own behind them. The gather is differentiable, so that a node's
gradient is the sum over all that grew from it. Stock mlx-lm models do the computing: they meet the
levels as a cache. Papers: Prefix Grouper (arXiv 2506.05433), Tree Training (2511.00413).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.policy.forest_packing import Layout, Level
from localrl.policy.model import Policy


def forest_states(policy: Policy, layout: Layout) -> mx.array:
    """States (positions, d) before the head of all levels, flattened one after another."""
    assert policy.hidden is not None
    states = []
    above: list[LevelCache] | None = None
    for level in layout.levels:
        caches = _level_caches(policy, level, above)
        hidden = policy.hidden(mx.array(level.tokens), cache=caches)  # (R, L, d)
        states.append(hidden.reshape(-1, hidden.shape[-1]))
        above = caches
    return mx.concatenate(states)


class LevelCache:
    """One layer's keys and values of a level, in the place of one of mlx-lm's caches.

    Holds the ancestors' keys and values (R, heads, P, head_dim), which of these P positions are
    real, and after the layer has run its own behind them.
    """

    def __init__(
        self, keys: mx.array | None, values: mx.array | None, valid: np.ndarray, lengths: np.ndarray
    ) -> None:
        self.keys, self.values = keys, values
        self._valid = valid  # (R, P) bool
        self._lengths = lengths
        self.offset = mx.array(valid.sum(axis=1).astype(np.int32))  # (R,) rotary position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The ancestors' and these, (R, heads, P + L, head_dim)."""
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, n: int, window_size: int | None = None, **_: Any) -> mx.array:
        """(R, 1, n, P + n) bool: real ancestors, own positions up to each, within the window."""
        real = np.concatenate([self._valid, np.ones((len(self._valid), n), bool)], axis=1)
        before = self._valid.sum(axis=1, keepdims=True)  # (R, 1)
        own = before + np.arange(n)  # (R, n) position of each query
        position = np.concatenate([np.cumsum(self._valid, axis=1) - 1, own], axis=1)  # (R, P + n)
        mask = real[:, None, :] & (position[:, None, :] <= own[:, :, None])
        if window_size is not None:
            mask &= position[:, None, :] > own[:, :, None] - window_size
        return mx.array(mask[:, None])

    def below(self, level: Level) -> LevelCache:
        """The cache of this layer for the level below."""
        assert self.keys is not None
        assert self.values is not None
        n = self.keys.shape[2] - self._valid.shape[1]
        own = np.arange(n) < self._lengths[:, None]
        valid = np.concatenate([self._valid, own], axis=1)[level.parents]
        parents = mx.array(level.parents)
        return LevelCache(self.keys[parents], self.values[parents], valid, level.lengths)


def _level_caches(policy: Policy, level: Level, above: list[LevelCache] | None) -> list[LevelCache]:
    if above is None:
        empty = np.zeros((len(level.tokens), 0), bool)
        return [LevelCache(None, None, empty, level.lengths) for _ in policy.model.layers]
    return [cache.below(level) for cache in above]
