"""Attention over many positions and its gradient, on the CPU.

It processes queries in blocks over the keys they attend to, and keeps no scores: the backward pass
recomputes them, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135). It runs in C if that was
built (`c/attention.h`), else in NumPy.
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
"""Number of query positions whose scores exist at once."""
SCORES = 1 << 20
"""Maximum number of scores that exist at once; it bounds the rows computed together."""

Heads = np.ndarray
"""Array (R, kv_heads, r, L, head_dim) in which the r query heads share one head of keys."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention softmax(scale * queries keys^T) values of R rows.

    Keys and values are (R, kv_heads, T, d).
    """

    queries: Heads
    keys: np.ndarray
    values: np.ndarray
    valid: np.ndarray
    """Mask (R, P) of real ancestors among the first P keys. The other keys are the queries' own
    positions, with a causal mask."""
    scale: float

    def forward(self) -> Heads:
        """Compute the output for every query."""
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
        """Gradients w.r.t. queries, keys and values, given the output `found` and its `grad`."""
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
        """The C kernels, if usable: their scores exist for only a few queries of a head at once."""
        return steps_for(self.keys.shape[-1])

    @cached_property
    def _each(self) -> int:
        """Maximum number of scores in one row's block."""
        _, heads, more, length, _ = self.queries.shape
        return heads * more * min(length, QUERIES) * self.keys.shape[2]

    @property
    def _rows(self) -> int:
        """Number of rows whose scores exist at once."""
        return min(len(self.queries), max(1, SCORES // max(self._each, 1)))

    def _blocks(self) -> Iterator[tuple[slice, slice, slice, np.ndarray]]:
        """Yield rows, block of queries, keys attended to, and weights (rows, h, r * L, T)."""
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
        """Additive mask of keys that a query does not attend to, (.., 1, L, P + block's end)."""
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
    """Return the C kernels if they support heads of this size: whole vectors in every build."""
    return steps() if _whole_vectors(head_dim) else None


def attends_in_c(head_dim: int) -> bool:
    """Return True if C kernels can be used for heads of this size, whatever timing finds."""
    return kernels is not None and _whole_vectors(head_dim)


def _whole_vectors(head_dim: int) -> bool:
    return head_dim % 16 == 0


def _hiding(seen: np.ndarray) -> np.ndarray:
    """Additive mask for scores: 0 where seen, -1e30 elsewhere."""
    return np.where(seen, np.float32(0), np.float32(-1e30))


def _folded(heads: Heads) -> np.ndarray:
    """Reshape (R, h, r, L, d) to (R, h, r * L, d)."""
    rows, kv_heads, more, length, size = heads.shape
    return heads.reshape(rows, kv_heads, more * length, size)


def _within(scratch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """View the start of a scratch buffer as an array of this shape."""
    return scratch[: math.prod(shape)].reshape(shape)


def as_heads(columns: np.ndarray, rows: int, size: int, kv_heads: int) -> Heads:
    """Copy columns (heads * size, R * L) to (R, kv_heads, r, L, size)."""
    heads = columns.shape[0] // size
    split = columns.reshape(kv_heads, heads // kv_heads, size, rows, -1)
    found = empty((rows, kv_heads, heads // kv_heads, split.shape[-1], size))
    found[...] = split.transpose(3, 0, 1, 4, 2)
    return found


def as_columns(heads: Heads) -> np.ndarray:
    """Invert `as_heads`."""
    rows, kv_heads, more, length, size = heads.shape
    found = empty((kv_heads, more, size, rows, length))
    found[...] = heads.transpose(1, 2, 4, 0, 3)
    return found.reshape(kv_heads * more * size, rows * length)
