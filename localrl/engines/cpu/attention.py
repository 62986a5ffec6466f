"""Attention over many positions in NumPy, and its gradient.

It goes block by block of queries over the keys that they see, and keeps no scores: for the gradient
they are computed again, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135). In C where that
was built (`c/attention.h`), else in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np

from localrl.backend import kernels
from localrl.engines.cpu.buffers import empty, zeros
from localrl.engines.cpu.kernel_choice import steps
from localrl.engines.cpu.math import softmax, softmax_back

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
    valid: np.ndarray
    """(R, P) bool: which of the first P keys are ancestors. The others are the queries' own
    positions, of which each sees those up to itself."""
    scale: float

    def forward(self) -> Heads:
        """What every query finds."""
        found = empty((*self.queries.shape[:-1], self.values.shape[-1]))
        if (c := self._steps) is not None:
            hidden = _hiding(self.valid)
            c.attend(self.queries, self.keys, self.values, hidden, found, self.scale)
            return found
        for rows, block, seen, weights in self._blocks():
            mine = found[rows, :, :, block]
            mine[...] = (weights @ self.values[rows, :, seen]).reshape(mine.shape)
        return found

    def back(self, found: Heads, grad: Heads) -> tuple[Heads, np.ndarray, np.ndarray]:
        """Gradients w.r.t. queries, keys and values, given `grad` w.r.t. the output."""
        grad_queries = empty(self.queries.shape)
        within = np.einsum("...i,...i->...", grad, found)[..., None]
        if (c := self._steps) is not None:
            grads = grad_queries, empty(self.keys.shape), empty(self.values.shape)
            given = self.queries, self.keys, self.values, _hiding(self.valid), within, grad
            c.attend_back(*given, *grads, self.scale)
            return grads
        grad_keys, grad_values = zeros(self.keys.shape), zeros(self.values.shape)
        scratch = empty((self._rows * self._each,))
        for rows, block, seen, weights in self._blocks():
            mine, inner = _folded(grad[rows, :, :, block]), _folded(within[rows, :, :, block])
            grad_values[rows, :, seen] += weights.swapaxes(-1, -2) @ mine
            by_scores = _within(scratch, weights.shape)
            np.matmul(mine, self.values[rows, :, seen].swapaxes(-1, -2), out=by_scores)
            softmax_back(weights, inner, by_scores, self.scale)
            queries = self.queries[rows, :, :, block]
            grad_keys[rows, :, seen] += by_scores.swapaxes(-1, -2) @ _folded(queries)
            by_block = by_scores @ self.keys[rows, :, seen]
            grad_queries[rows, :, :, block] = by_block.reshape(queries.shape)
        return grad_queries, grad_keys, grad_values

    @property
    def _steps(self) -> ModuleType | None:
        """The steps in C, where they do it: scores exist for a few queries of a head at once."""
        return steps_for(self.keys.shape[-1])

    @cached_property
    def _each(self) -> int:
        """Scores of one row's block, at most."""
        _, heads, more, length, _ = self.queries.shape
        return heads * more * min(length, QUERIES) * self.keys.shape[2]

    @property
    def _rows(self) -> int:
        """Rows whose scores exist at once."""
        return min(len(self.queries), max(1, SCORES // max(self._each, 1)))

    def _blocks(self) -> Iterator[tuple[slice, slice, slice, np.ndarray]]:
        """Rows, their queries, the keys that these see, and the weights (rows, h, r * L, T)."""
        count, _, _, length, _ = self.queries.shape
        scratch = empty((self._rows * self._each,))
        for start in range(0, length, QUERIES):
            block = slice(start, min(start + QUERIES, length))
            for first in range(0, count, self._rows):
                rows = slice(first, min(first + self._rows, count))
                yield (rows, block, *self._weights(rows, block, scratch))

    def _weights(self, rows: slice, block: slice, scratch: np.ndarray) -> tuple[slice, np.ndarray]:
        seen = slice(0, self.valid.shape[1] + block.stop)
        queries = _folded(self.queries[rows, :, :, block] * np.float32(self.scale))
        keys = self.keys[rows, :, seen].swapaxes(-1, -2)
        scores = _within(scratch, (*queries.shape[:-1], keys.shape[-1]))
        np.matmul(queries, keys, out=scores)
        return seen, softmax(scores, self._hidden(rows, block))

    def _hidden(self, rows: slice, block: slice) -> np.ndarray:
        """What makes nothing of keys that a query does not see, (.., 1, L, P + block's end)."""
        valid = self.valid[rows]
        valid = valid[:1] if valid.all() else valid
        shape = (len(valid), block.stop - block.start)
        own = np.tri(shape[1], block.stop, block.start, dtype=bool)
        parts = [
            np.broadcast_to(valid[:, None], (*shape, valid.shape[1])),
            np.broadcast_to(own, (*shape, block.stop)),
        ]
        return _hiding(np.concatenate(parts, axis=2))[:, None]


def steps_for(head_dim: int) -> ModuleType | None:
    """The steps in C, where they attend to heads of this size: whole vectors of any build."""
    return steps() if _whole_vectors(head_dim) else None


def attends_in_c(head_dim: int) -> bool:
    """Whether they would, unless a timing finds NumPy to be faster."""
    return kernels is not None and _whole_vectors(head_dim)


def _whole_vectors(head_dim: int) -> bool:
    return head_dim % 16 == 0


def _hiding(seen: np.ndarray) -> np.ndarray:
    """What is added to scores: it makes nothing of those that are not seen."""
    return np.where(seen, np.float32(0), np.float32(-1e30))


def _folded(heads: Heads) -> np.ndarray:
    """(R, h, r, L, d) as (R, h, r * L, d)."""
    rows, kv_heads, more, length, size = heads.shape
    return heads.reshape(rows, kv_heads, more * length, size)


def _within(scratch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array at the front of some room."""
    return scratch[: math.prod(shape)].reshape(shape)


def as_heads(columns: np.ndarray, rows: int, size: int, kv_heads: int) -> Heads:
    """Columns (heads * size, R * L) as (R, kv_heads, r, L, size)."""
    heads = columns.shape[0] // size
    split = columns.reshape(kv_heads, heads // kv_heads, size, rows, -1)
    found = empty((rows, kv_heads, heads // kv_heads, split.shape[-1], size))
    found[...] = split.transpose(3, 0, 1, 4, 2)
    return found


def as_columns(heads: Heads) -> np.ndarray:
    """The inverse of `as_heads`."""
    rows, kv_heads, more, length, size = heads.shape
    found = empty((kv_heads, more, size, rows, length))
    found[...] = heads.transpose(1, 2, 4, 0, 3)
    return found.reshape(kv_heads * more * size, rows * length)
