"""A forward pass over many positions in NumPy, and the gradient of the adapters.

This is the counterpart of `mlx.forest` and of MLX's gradient for models that `model` can read.
Levels of a forest go through the blocks together: a level attends to the gathered keys and values
of its rows' parents, followed by its own. Activations for the gradient are kept in records, one for
each block and level, and freed as the backward pass uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.engines.cpu.attention import Attention, as_columns, as_heads
from localrl.engines.cpu.levels import LevelContext
from localrl.engines.cpu.math import (
    KV,
    LoraGrads,
    Norm,
    RopeTables,
    ignore_overflow,
    swiglu,
    swiglu_back,
)
from localrl.engines.cpu.model import CPUModel, Rope
from localrl.engines.cpu.weights import Block
from localrl.policy.forest_packing import Level


@dataclass(frozen=True, eq=False)
class Activations:
    """A block's activations for one level, as columns (.., R * L); `own` by head."""

    entered: np.ndarray
    own: KV
    """Keys and values (R, kv_heads, L, head_dim)."""
    queries: np.ndarray | None = None
    """Queries before norm and rope, as are `keys`."""
    keys: np.ndarray | None = None
    attn_out: np.ndarray | None = None
    residual: np.ndarray | None = None
    """Hidden states between attention and feed-forward layer."""
    gate: np.ndarray | None = None
    up: np.ndarray | None = None


class ForwardPass:
    """One forward pass and at most one backward pass."""

    def __init__(
        self, model: CPUModel, levels: Sequence[Level], *, keep: bool, recompute: bool = False
    ) -> None:
        """keep: keep activations for `back`. recompute: only each block's input, keys, values."""
        self._model, self.weights = model, model.read()
        self._keep, self._recompute = keep, recompute
        self.levels: list[LevelContext] = []
        for level in levels:
            self.levels.append(LevelContext(level, self.levels[-1] if self.levels else None))
        self._kept: list[list[Activations]] = []
        self._tables: dict[tuple[int, int], RopeTables] = {}
        self._lowest = self.weights.lowest_adapted

    @property
    def positions(self) -> int:
        """Number of positions in all levels, padding included."""
        return sum(context.level.tokens.size for context in self.levels)

    @ignore_overflow
    def forward(self, pairs: list[KV] | None = None) -> np.ndarray:
        """Hidden states (d, positions) before the last norm, all levels one after another.

        pairs: receives the keys and values of the last level in each block.
        """
        weights = self.weights
        states = [
            np.ascontiguousarray(weights.embedding[context.level.tokens.ravel()].T)
            for context in self.levels
        ]
        for n, block in enumerate(weights.blocks):
            made: list[Activations] = []
            ancestors: KV | None = None
            for place, x in enumerate(states):
                kept, ancestors, states[place] = self._block(n, block, place, x, ancestors)
                made.append(kept)
            if pairs is not None and ancestors is not None:
                pairs.append(ancestors)
            if self._keep and n >= self._lowest:
                self._kept.append(made)
        return np.concatenate(states, axis=1)

    @ignore_overflow
    def back(self, grad: np.ndarray) -> list[LoraGrads]:
        """Gradients w.r.t. the adapters in `CPUModel.adapters`, given `grad` w.r.t. the states."""
        edges = np.cumsum([context.level.tokens.size for context in self.levels])[:-1]
        grads = [np.ascontiguousarray(part) for part in np.split(grad, edges, axis=1)]
        found: list[list[LoraGrads]] = []
        for n in reversed(range(self._lowest, len(self.weights.blocks))):
            found.append(self._block_back(n, grads))
        return [pair for pairs in reversed(found) for pair in pairs]

    def _block_back(self, n: int, grads: list[np.ndarray]) -> list[LoraGrads]:
        """Gradients w.r.t. a block's adapters.

        grads: gradients w.r.t. the block's output, by level; replaced by those w.r.t. its input.
        """
        kept, total = self._kept.pop(), list[LoraGrads]()
        pairs: list[KV] = []
        for context, one in zip(self.levels, kept, strict=True):
            pairs.append(context.with_ancestors(one.own, pairs[-1] if pairs else None))
        below: KV | None = None
        for place in reversed(range(len(kept))):
            ancestors = pairs[place - 1] if place else None
            back = BlockBackward(
                self, n, place, self._again(n, place, kept.pop(), ancestors), pairs.pop()
            )
            grads[place], mine, grad_kv = back.run(grads[place], below, n > self._lowest)
            if ancestors is not None:
                below = self.levels[place].scatter_to_parent(grad_kv, ancestors)
            total = _sums(total, mine) if total else mine
            del back
        return total

    def _again(self, n: int, place: int, kept: Activations, ancestors: KV | None) -> Activations:
        """The block's activations for the level, recomputed if they were not kept."""
        if kept.queries is not None:
            return kept
        block = self.weights.blocks[n]
        return self._block(n, block, place, kept.entered, ancestors, whole=True)[0]

    def _block(
        self,
        n: int,
        block: Block,
        place: int,
        x: np.ndarray,
        ancestors: KV | None,
        whole: bool = False,
    ) -> tuple[Activations, KV, np.ndarray]:
        """Run a level through a block; return activations, all keys and values, and the output.

        ancestors: keys and values of the parent level. whole: keep all that a backward pass needs.
        """
        queries, keys, values = block.queries_keys_values(block.attention_norm(x))
        own = self._heads(place, self._positioned(n, place, block.key_norm, keys))
        own = own, self._heads(place, values)
        pair = self.levels[place].with_ancestors(own, ancestors)
        found = as_columns(self.attention(n, block, place, queries, pair).forward())
        kept = Activations(x, own)
        whole = whole or (self._keep and not self._recompute)
        if whole:
            kept = replace(kept, queries=queries, keys=keys, attn_out=found)
        del queries, keys, values
        residual = block.output(found)[0]
        residual += x
        gate, up = block.gate_up(block.feed_forward_norm(residual))
        after = block.down(swiglu(gate, up))[0]
        after += residual
        return replace(kept, residual=residual, gate=gate, up=up) if whole else kept, pair, after

    def _heads(self, place: int, columns: np.ndarray) -> np.ndarray:
        """Reshape columns of keys or values to (R, kv_heads, L, head_dim)."""
        model, rows = self._model, self.levels[place].rows
        return as_heads(columns, rows, model.head_dim, model.kv_heads)[:, :, 0]

    def attention(
        self, n: int, block: Block, place: int, queries: np.ndarray, pair: KV
    ) -> Attention:
        """Attention of a level in a block, from its queries' columns."""
        model, context = self._model, self.levels[place]
        rotated = self._positioned(n, place, block.query_norm, queries)
        heads = as_heads(rotated, context.rows, model.head_dim, model.kv_heads)
        return Attention(heads, *pair, context.valid, model.scale)

    def _positioned(self, n: int, place: int, norm: Norm | None, columns: np.ndarray) -> np.ndarray:
        """Apply norm and rope to queries or keys."""
        split = self.split(columns)
        rope = self.rope(n)
        rotated = rope.rotate(split if norm is None else norm(split), self.tables(n, place))
        return rotated.reshape(columns.shape)

    def split(self, columns: np.ndarray) -> np.ndarray:
        """Reshape (heads * head_dim, B) to (heads, head_dim, B)."""
        return columns.reshape(-1, self._model.head_dim, columns.shape[1])

    def rope(self, n: int) -> Rope:
        """Rope of block n."""
        return self._model.ropes[n]

    def tables(self, n: int, place: int) -> RopeTables:
        """Rope tables for a level's positions in block n."""
        key = id(self.rope(n)), place
        if key not in self._tables:
            self._tables[key] = self.rope(n).tables(self.levels[place].positions)
        return self._tables[key]


class BlockBackward:
    """The backward pass through one block for one level."""

    def __init__(
        self, forward_pass: ForwardPass, n: int, place: int, kept: Activations, pair: KV
    ) -> None:
        self._forward_pass, self._n, self._place = forward_pass, n, place
        self._kept, self._pair = kept, pair
        self._block = forward_pass.weights.blocks[n]

    def run(
        self, grad: np.ndarray, below: KV | None, need_grad_x: bool
    ) -> tuple[np.ndarray, list[LoraGrads], KV]:
        """Gradients w.r.t. the block's input, its adapters, and all keys and values it read.

        below: gradients w.r.t. the level's keys and values, from its child level. Without
        `need_grad_x` the first is not computed.
        """
        grad, feed_forward = self._feed_forward(grad)
        block, kept, one = self._block, self._kept, self._forward_pass
        assert kept.attn_out is not None
        assert kept.queries is not None
        assert kept.keys is not None
        grad_attn, output = block.output.back(kept.attn_out, [grad])
        assert grad_attn is not None
        grad_queries, grad_kv = self._attention(kept.queries, kept.attn_out, grad_attn, below)
        length = one.levels[self._place].level.tokens.shape[1]
        own = [as_columns(array[:, :, None, -length:]) for array in grad_kv]
        grads = [
            self._unpositioned(block.query_norm, kept.queries, grad_queries),
            self._unpositioned(block.key_norm, kept.keys, own[0]),
            own[1],
        ]
        normed = block.attention_norm(kept.entered)
        grad_normed, first = block.queries_keys_values.back(normed, grads, need_grad_x)
        if grad_normed is not None:
            grad += block.attention_norm.back(kept.entered, grad_normed)
        return grad, [*first, *output, *feed_forward], grad_kv

    def _attention(
        self, queries: np.ndarray, found: np.ndarray, grad_attn: np.ndarray, below: KV | None
    ) -> tuple[np.ndarray, KV]:
        """Gradients w.r.t. the rotated queries, as columns, and w.r.t. keys and values."""
        attention = self._forward_pass.attention(
            self._n, self._block, self._place, queries, self._pair
        )
        rows, kv_heads, _, size = attention.keys.shape
        folded = (as_heads(array, rows, size, kv_heads) for array in (found, grad_attn))
        grad_queries, grad_keys, grad_values = attention.back(*folded)
        if below is not None:
            grad_keys += below[0]
            grad_values += below[1]
        return as_columns(grad_queries), (grad_keys, grad_values)

    def _feed_forward(self, grad: np.ndarray) -> tuple[np.ndarray, list[LoraGrads]]:
        """Gradients w.r.t. the residual after attention and the feed-forward layer's adapters."""
        block, kept = self._block, self._kept
        assert kept.gate is not None
        assert kept.up is not None
        assert kept.residual is not None
        grad_product, down = block.down.back(swiglu(kept.gate, kept.up), [grad])
        assert grad_product is not None
        grads = swiglu_back(kept.gate, kept.up, grad_product)
        grad_normed, gate_up = block.gate_up.back(block.feed_forward_norm(kept.residual), grads)
        assert grad_normed is not None
        grad_normed = block.feed_forward_norm.back(kept.residual, grad_normed)
        grad_normed += grad
        return grad_normed, [*gate_up, *down]

    def _unpositioned(self, norm: Norm | None, raw: np.ndarray, grad: np.ndarray) -> np.ndarray:
        one = self._forward_pass
        grad = one.rope(self._n).back(one.split(grad), one.tables(self._n, self._place))
        if norm is not None:
            grad = norm.back(one.split(raw), grad)
        return grad.reshape(raw.shape)


def _sums(one: Sequence[LoraGrads], two: Sequence[LoraGrads]) -> list[LoraGrads]:
    return [(a + c, b + d) for (a, b), (c, d) in zip(one, two, strict=True)]
