"""Scoring a forest: each prompt and node is computed once, children attend to their ancestors.

It goes level by level: prompts, roots, their children, and so on. A level attends to the gathered
keys and values of its rows' parents, followed by its own; recurrent layers and convolutions go on
from the state at the end of each row's parent. The gather is differentiable, so a node's gradient
is the sum over all its descendants. Stock mlx-lm models do the computing: they see the levels as a
cache. Papers: Prefix Grouper (arXiv 2506.05433), Tree Training (2511.00413).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.engines.mlx.network import Network
from localrl.policy.forest_packing import Layout, Level

FEW_QUERIES = 8
"""Queries up to which mlx 0.32.4 takes its vector kernels on Metal, which have no gradient for
causal attention and raise an error."""


def forest_states(network: Network, layout: Layout) -> mx.array:
    """Hidden states (positions, d) before the head, of all levels, one after another."""
    assert network.hidden is not None
    states = []
    above: list[AnyLevel] | None = None
    for level in layout.levels:
        last = level is layout.levels[-1]
        caches = _level_caches(network, level, above, last)
        hidden = network.hidden(mx.array(level.tokens), cache=caches)  # (R, L, d)
        states.append(hidden.reshape(-1, hidden.shape[-1]))
        above = caches
    return mx.concatenate(states)


KeysValues = tuple[mx.array, mx.array]
"""Keys and values, both (R, heads, L, head_dim)."""
Own = tuple[mx.array, ...]
"""Arrays that a layer leaves for the levels below, with one entry per row."""


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

    def make_mask(self, n: int, window_size: int | None = None, **_: Any) -> mx.array | str:
        """Mask (R, 1, n, P + n): real ancestors and causal own positions, within the window.

        It is "causal" for prompts, of which MLX may have a gradient that keeps no scores.
        """
        if self._above is None and window_size is None and n > FEW_QUERIES:
            return "causal"
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


class LevelState:
    """One layer's states at the ends of a level's rows, in place of mlx-lm's `ArraysCache`.

    A layer finds the states of the rows' parents in it, of fixed size per row (the last inputs of a
    convolution, a recurrent state), and puts those at the ends of its rows there.
    """

    def __init__(self, level: Level, above: LevelState | None, size: int, last: bool) -> None:
        self.last = last
        """True for the last level."""
        self.lengths = mx.array(level.lengths)  # (R,): padding behind them changes no state
        self._above = above
        self._parents = mx.array(level.parents)
        self._states: list[mx.array | None] = [None] * size
        if above is not None:
            self._begin(above.own)

    def _begin(self, parents: Own) -> None:
        self._states = [array[self._parents] for array in parents]

    def __getitem__(self, index: int) -> mx.array | None:
        return self._states[index]

    def __setitem__(self, index: int, state: mx.array) -> None:
        self._states[index] = state

    @property
    def own(self) -> Own:
        """States at the ends of the rows, once the layer has run."""
        return tuple(state for state in self._states if state is not None)

    @own.setter
    def own(self, states: Own) -> None:
        self._states = list(states)

    def advance(self, n: int) -> None:
        """Do nothing: a level is computed in one piece."""

    def make_mask(self, n: int) -> mx.array:
        """Mask (R, n), True at tokens."""
        return mx.arange(n) < self.lengths[:, None]

    def lineage(self) -> list[Own]:
        """The parents' states."""
        return [] if self._above is None else [self._above.own]

    def renewed(self, lineage: Sequence[Own]) -> LevelState:
        """Copy this cache as before its layer ran, under parents with these states."""
        fresh = copy.copy(self)
        fresh._states = [None] * len(self._states)
        if lineage:
            fresh._begin(lineage[-1])
        return fresh


AnyLevel = LevelCache | LevelState


def _level_caches(
    network: Network, level: Level, above: list[AnyLevel] | None, last: bool
) -> list[AnyLevel]:
    from mlx_lm.models.cache import ArraysCache, make_prompt_cache

    caches: list[AnyLevel] = []
    for n, kind in enumerate(make_prompt_cache(network.model)):
        parent: Any = above[n] if above else None
        if isinstance(kind, ArraysCache):
            caches.append(LevelState(level, parent, len(kind.cache), last))
        else:
            caches.append(LevelCache(level, parent, last))
    return caches
