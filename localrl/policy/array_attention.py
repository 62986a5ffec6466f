"""Attention over many positions in NumPy, and its gradient.

It goes block by block of queries over the keys that they see, and keeps no scores: for the gradient
they are computed again, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from localrl.policy.array_math import room, zeros

QUERIES = 128
"""Positions whose scores exist at once."""
SCORES = 1 << 20
"""Scores that exist at once, of as many rows as that allows."""

Heads = np.ndarray
"""(R, kv_heads, r, L, head_dim), heads that share keys and values side by side."""


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale * queries keys^T) values of R rows, for keys and values (R, kv_heads, T, d)."""

    queries: Heads
    keys: np.ndarray
    values: np.ndarray
    mask: np.ndarray
    """(R, L, T) bool, True where a query sees a key."""
    scale: float

    def forward(self) -> Heads:
        """What every query finds."""
        found = room((*self.queries.shape[:-1], self.values.shape[-1]))
        for rows, block, seen, weights in self._blocks():
            np.matmul(weights, self.values[rows, :, None, seen], out=found[rows, :, :, block])
        return found

    def back(self, found: Heads, slope: Heads) -> tuple[Heads, np.ndarray, np.ndarray]:
        """Slopes by queries, keys and values, from that by what was found."""
        by_queries = room(self.queries.shape)
        by_keys, by_values = zeros(self.keys.shape), zeros(self.values.shape)
        within = np.einsum("...i,...i->...", slope, found)[..., None]
        for rows, block, seen, weights in self._blocks():
            mine = slope[rows, :, :, block]
            by_values[rows, :, seen] += (weights.swapaxes(-1, -2) @ mine).sum(axis=2)
            values = self.values[rows, :, None, seen].swapaxes(-1, -2)
            by_scores = np.matmul(mine, values, out=room(weights.shape))
            by_scores -= within[rows, :, :, block]
            by_scores *= weights
            by_scores *= np.float32(self.scale)
            keys, queries = self.keys[rows, :, None, seen], self.queries[rows, :, :, block]
            np.matmul(by_scores, keys, out=by_queries[rows, :, :, block])
            by_keys[rows, :, seen] += (by_scores.swapaxes(-1, -2) @ queries).sum(axis=2)
        return by_queries, by_keys, by_values

    def _blocks(self) -> Iterator[tuple[slice, slice, slice, np.ndarray]]:
        """Rows, their queries, the keys that these see, and the weights (rows, .., L, T) there."""
        count, heads, more, length, _ = self.queries.shape
        for start in range(0, length, QUERIES):
            block = slice(start, min(start + QUERIES, length))
            each = heads * more * (block.stop - block.start) * self.keys.shape[2]
            rows = max(1, SCORES // max(each, 1))
            for first in range(0, count, rows):
                part = slice(first, min(first + rows, count))
                yield (part, block, *self._weights(part, block))

    def _weights(self, rows: slice, block: slice) -> tuple[slice, np.ndarray]:
        mask = self.mask[rows, block]
        columns = np.flatnonzero(mask.any(axis=(0, 1)))
        seen = slice(int(columns[0]), int(columns[-1]) + 1)
        mask = mask[:, :, seen]
        queries = self.queries[rows, :, :, block] * np.float32(self.scale)
        keys = self.keys[rows, :, None, seen].swapaxes(-1, -2)
        scores = np.matmul(queries, keys, out=room((*queries.shape[:-1], keys.shape[-1])))
        if not mask.all():
            scores += np.where(mask, np.float32(0), np.float32(-1e30))[:, None, None]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return seen, scores


def as_heads(columns: np.ndarray, rows: int, size: int, kv_heads: int) -> Heads:
    """Columns (heads * size, R * L) as (R, kv_heads, r, L, size)."""
    heads = columns.shape[0] // size
    split = columns.reshape(kv_heads, heads // kv_heads, size, rows, -1)
    found = room((rows, kv_heads, heads // kv_heads, split.shape[-1], size))
    found[...] = split.transpose(3, 0, 1, 4, 2)
    return found


def as_columns(heads: Heads) -> np.ndarray:
    """The inverse of `as_heads`."""
    rows, kv_heads, more, length, size = heads.shape
    found = room((kv_heads, more, size, rows, length))
    found[...] = heads.transpose(1, 2, 4, 0, 3)
    return found.reshape(kv_heads * more * size, rows * length)
