"""Parent indices and ancestor keys and values of a token forest, level by level."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from localrl.engines.cpu.buffers import empty, zeros
from localrl.engines.cpu.math import KV
from localrl.policy.forest_packing import Level


@dataclass(frozen=True, eq=False)
class LevelContext:
    """A level of the forest, its parent level, and the positions that each row attends to."""

    level: Level
    parent: LevelContext | None

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return len(self.level.tokens)

    @cached_property
    def valid(self) -> np.ndarray:
        """Mask (R, P) of the positions in the levels above that are real ancestors."""
        if self.parent is None:
            return np.zeros((self.rows, 0), bool)
        own = np.arange(self.parent.level.tokens.shape[1]) < self.parent.level.lengths[:, None]
        return np.concatenate([self.parent.valid, own], axis=1)[self.level.parents]

    @cached_property
    def positions(self) -> np.ndarray:
        """Rope positions (R * L,)."""
        length = self.level.tokens.shape[1]
        return (self.valid.sum(axis=1, keepdims=True) + np.arange(length)).ravel()

    def with_ancestors(self, own: KV, ancestors: KV | None) -> KV:
        """Join keys and values to (R, kv_heads, P + L, head_dim): ancestors', then the level's own.

        ancestors: the result for the parent level; None for the first level.
        """
        if ancestors is None:
            return own
        keys, values = (self._with_ancestors(*two) for two in zip(own, ancestors, strict=True))
        return keys, values

    def _with_ancestors(self, own: np.ndarray, ancestors: np.ndarray) -> np.ndarray:
        rows, heads, length, size = own.shape
        both = empty((rows, heads, ancestors.shape[2] + length, size))
        both[:, :, ancestors.shape[2] :] = own
        for row, parent in enumerate(self.level.parents):
            both[row, :, : ancestors.shape[2]] = ancestors[parent]
        return both

    def scatter_to_parent(self, grads: KV, ancestors: KV) -> KV:
        """Gradients w.r.t. the parent level's keys and values (R', kv_heads, P, head_dim).

        grads: gradients w.r.t. the result of `with_ancestors`; each row's is added to its parent's.
        """
        keys, values = (self._scatter(*two) for two in zip(grads, ancestors, strict=True))
        return keys, values

    def _scatter(self, grad: np.ndarray, ancestors: np.ndarray) -> np.ndarray:
        total = zeros(ancestors.shape)
        for row, parent in enumerate(self.level.parents):
            total[parent] += grad[row, :, : ancestors.shape[2]]
        return total
