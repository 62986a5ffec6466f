"""Scoring a forest: each prompt and node is computed once, children attend to their ancestors.

It goes level by level: prompts, roots, their children, and so on. A level attends to the gathered
keys and values of its rows' parents, followed by its own. The gather is differentiable, so a node's
gradient is the sum over all its descendants. Stock mlx-lm models do the computing: they see the
levels as a cache. Papers: Prefix Grouper (arXiv 2506.05433), Tree Training (2511.00413).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.engines.mlx.network import Network
from localrl.policy.forest_packing import Layout, Level


def forest_states(network: Network, layout: Layout) -> mx.array:
    """Hidden states (positions, d) before the head, of all levels, one after another."""
    assert network.hidden is not None
    states = []
    above: list[LevelCache] | None = None
    for level in layout.levels:
        last = level is layout.levels[-1]
        caches = _level_caches(network, level, above, last)
        hidden = network.hidden(mx.array(level.tokens), cache=caches)  # (R, L, d)
        states.append(hidden.reshape(-1, hidden.shape[-1]))
        above = caches
    return mx.concatenate(states)


KeysValues = tuple[mx.array, mx.array]
"""Keys and values, both (R, heads, L, head_dim)."""


class LevelCache:
    """One layer's keys and values of a level, in place of one of mlx-lm's caches.

    It holds the cache of the parent level, the mask of its real ancestors and, after the layer has
    run, the level's own keys and values, both alone and with the ancestors' before them.
    """

    def __init__(self, level: Level, above: LevelCache | None, last: bool) -> None:
        self._above, self._lengths = above, level.lengths
        self.last = last
        """True for the last level."""
        self.own: KeysValues | None = None
        self._whole: KeysValues | None = None
        if above is None:
            self._valid = np.zeros((len(level.tokens), 0), bool)
        else:
            self._valid = above._valid_below(level)  # (R, P) bool
            self._parents = mx.array(level.parents)
        before = self._valid.sum(axis=1).astype(np.int32)
        self.offset = mx.array(before)  # (R,) rope position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Store these; return them after the ancestors', (R, heads, P + L, head_dim)."""
        self.own = keys, values
        if self._above is not None:
            assert self._above._whole is not None
            before = [array[self._parents] for array in self._above._whole]
            keys = mx.concatenate([before[0], keys], axis=2)
            values = mx.concatenate([before[1], values], axis=2)
        self._whole = keys, values
        return keys, values

    def make_mask(self, n: int, window_size: int | None = None, **_: Any) -> mx.array:
        """Mask (R, 1, n, P + n): real ancestors and causal own positions, within the window."""
        real = np.concatenate([self._valid, np.ones((len(self._valid), n), bool)], axis=1)
        before = self._valid.sum(axis=1, keepdims=True)  # (R, 1)
        own = before + np.arange(n)  # (R, n) position of each query
        position = np.concatenate([np.cumsum(self._valid, axis=1) - 1, own], axis=1)  # (R, P + n)
        mask = real[:, None, :] & (position[:, None, :] <= own[:, :, None])
        if window_size is not None:
            mask &= position[:, None, :] > own[:, :, None] - window_size
        return mx.array(mask[:, None])

    def lineage(self) -> list[KeysValues]:
        """Own keys and values of the levels above, from the top: each row appears only once."""
        if self._above is None:
            return []
        assert self._above.own is not None
        return [*self._above.lineage(), self._above.own]

    def renewed(self, lineage: Sequence[KeysValues]) -> LevelCache:
        """Copy this cache as before its layer ran, under ancestors with these keys and values."""
        fresh = copy.copy(self)
        fresh.own = fresh._whole = None
        if self._above is not None:
            fresh._above = self._above.renewed(lineage[:-1])
            fresh._above.update_and_fetch(*lineage[-1])
        return fresh

    def _valid_below(self, level: Level) -> np.ndarray:
        """Mask (R, P) of the positions that are ancestors of each row of the child level."""
        assert self.own is not None
        own = np.arange(self.own[0].shape[2]) < self._lengths[:, None]
        return np.concatenate([self._valid, own], axis=1)[level.parents]


def _level_caches(
    network: Network, level: Level, above: list[LevelCache] | None, last: bool
) -> list[LevelCache]:
    parents = above or [None] * len(network.model.layers)
    return [LevelCache(level, parent, last) for parent in parents]
