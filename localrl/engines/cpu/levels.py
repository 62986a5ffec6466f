"""Levels of a forest in NumPy: who is below whom, and the keys and values of ancestors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from localrl.engines.cpu.buffers import room, zeros
from localrl.engines.cpu.math import Pair
from localrl.policy.forest_packing import Level


@dataclass(frozen=True, eq=False)
class Ground:
    """One level: its tokens, and what each position sees."""

    level: Level
    above: Ground | None

    @property
    def rows(self) -> int:
        """R."""
        return len(self.level.tokens)

    @cached_property
    def valid(self) -> np.ndarray:
        """(R, P) bool: positions of the levels above that are real ancestors."""
        if self.above is None:
            return np.zeros((self.rows, 0), bool)
        own = np.arange(self.above.level.tokens.shape[1]) < self.above.level.lengths[:, None]
        return np.concatenate([self.above.valid, own], axis=1)[self.level.parents]

    @cached_property
    def positions(self) -> np.ndarray:
        """(R * L,) rotary positions."""
        length = self.level.tokens.shape[1]
        return (self.valid.sum(axis=1, keepdims=True) + np.arange(length)).ravel()

    def behind(self, own: Pair, above: Pair | None) -> Pair:
        """Keys and values (R, kv_heads, P + L, head_dim): the ancestors', then the level's own.

        above: those of the level above, with its ancestors; None for the first level.
        """
        if above is None:
            return own
        keys, values = (self._behind(*two) for two in zip(own, above, strict=True))
        return keys, values

    def _behind(self, own: np.ndarray, above: np.ndarray) -> np.ndarray:
        rows, heads, length, size = own.shape
        both = room((rows, heads, above.shape[2] + length, size))
        both[:, :, above.shape[2] :] = own
        for row, parent in enumerate(self.level.parents):
            both[row, :, : above.shape[2]] = above[parent]
        return both

    def gather(self, slopes: Pair, above: Pair) -> Pair:
        """Slopes by the level above's (R', kv_heads, P, head_dim), from those by `behind`'s."""
        keys, values = (self._gather(*two) for two in zip(slopes, above, strict=True))
        return keys, values

    def _gather(self, slope: np.ndarray, above: np.ndarray) -> np.ndarray:
        total = zeros(above.shape)
        for row, parent in enumerate(self.level.parents):
            total[parent] += slope[row, :, : above.shape[2]]
        return total
