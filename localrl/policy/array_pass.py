"""A forward pass over many positions in NumPy, and the gradient of the adapters.

The counterpart of `forest` and of MLX's gradient for models that `array_model` reads. Levels of a
forest go through the blocks together: a level's keys and values are those of its rows' parents,
gathered, and its own behind them. What the gradient needs is kept in this module's own records, one
for each block and level, and let go as the backward pass meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from localrl.policy.array_attention import Attention, as_columns, as_heads
from localrl.policy.array_math import Norm, Pair, quiet, room, swiglu, swiglu_back, zeros
from localrl.policy.array_model import ArrayModel, Block, Rotary
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

    @cached_property
    def mask(self) -> np.ndarray:
        """(R, L, P + L) bool: real ancestors, and own positions up to each."""
        length = self.level.tokens.shape[1]
        shape = (self.rows, length)
        before = np.broadcast_to(self.valid[:, None], (*shape, self.valid.shape[1]))
        own = np.broadcast_to(np.tri(length, dtype=bool), (*shape, length))
        return np.concatenate([before, own], axis=2)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a block has made of a level, (.., R * L) columns but for keys and values."""

    entered: np.ndarray
    pair: Pair
    """Keys and values of the level and its ancestors, (R, kv_heads, P + L, head_dim)."""
    queries: np.ndarray | None = None
    """Before norm and positions, as the next one."""
    keys: np.ndarray | None = None
    found: np.ndarray | None = None
    """By attention."""
    between: np.ndarray | None = None
    """The states between attention and feed-forward layer."""
    gate: np.ndarray | None = None
    up: np.ndarray | None = None


class Pass:
    """One forward pass, and at most one way back."""

    def __init__(
        self, model: ArrayModel, levels: Sequence[Level], *, keep: bool, recompute: bool = False
    ) -> None:
        """keep: for `back`. recompute: keep what goes into each block, and its keys and values."""
        self._model, self.weights = model, model.read()
        self._keep, self._recompute = keep, recompute
        self.grounds: list[Ground] = []
        for level in levels:
            self.grounds.append(Ground(level, self.grounds[-1] if self.grounds else None))
        self._kept: list[list[Kept]] = []
        self._tables: dict[tuple[int, int], Pair] = {}
        self._lowest = self.weights.lowest_adapted

    @property
    def positions(self) -> int:
        """Of all levels, padding included."""
        return sum(ground.level.tokens.size for ground in self.grounds)

    @quiet
    def forward(self, pairs: list[Pair] | None = None) -> np.ndarray:
        """States (d, positions) before the last norm, of all levels one after another.

        pairs: gets the keys and values of the last level in each block.
        """
        weights = self.weights
        states = [
            np.ascontiguousarray(weights.embedding[ground.level.tokens.ravel()].T)
            for ground in self.grounds
        ]
        for n, block in enumerate(weights.blocks):
            made: list[Kept] = []
            for place, x in enumerate(states):
                kept, states[place] = self._block(n, block, place, x, made[-1] if made else None)
                made.append(kept)
            if pairs is not None:
                pairs.append(made[-1].pair)
            if self._keep and n >= self._lowest:
                self._kept.append([self._cut(kept) for kept in made])
        return np.concatenate(states, axis=1)

    @quiet
    def back(self, slope: np.ndarray) -> list[Pair]:
        """Slopes by lora_a and lora_b of `ArrayModel.adapters`, from that by the states."""
        edges = np.cumsum([ground.level.tokens.size for ground in self.grounds])[:-1]
        slopes = [np.ascontiguousarray(part) for part in np.split(slope, edges, axis=1)]
        found: list[list[Pair]] = []
        for n in reversed(range(self._lowest, len(self.weights.blocks))):
            kept = self._kept.pop()
            whole = [tuple(zeros(array.shape) for array in k.pair) for k in kept]
            total: list[Pair] = []
            for place in reversed(range(len(kept))):
                back = _Back(self, n, place, self._again(n, place, kept))
                slopes[place], mine, ancestors = back.run(
                    slopes[place], whole[place], n > self._lowest
                )
                if place:
                    _add_rows(whole[place - 1], ancestors, self.grounds[place].level.parents)
                kept.pop()
                total = _sums(total, mine) if total else mine
            found.append(total)
        return [pair for pairs in reversed(found) for pair in pairs]

    def _cut(self, kept: Kept) -> Kept:
        return Kept(kept.entered, kept.pair) if self._recompute else kept

    def _again(self, n: int, place: int, kept: Sequence[Kept]) -> Kept:
        """What the block made of the level, computed once more where it was not kept."""
        mine = kept[place]
        if mine.queries is not None:
            return mine
        above = kept[place - 1] if place else None
        return self._block(n, self.weights.blocks[n], place, mine.entered, above)[0]

    def _block(
        self, n: int, block: Block, place: int, x: np.ndarray, above: Kept | None
    ) -> tuple[Kept, np.ndarray]:
        """What is kept of a level in a block, and the states after it."""
        queries, keys, values = block.queries_keys_values(block.attention_norm(x))
        pair = self._pair(n, block, place, keys, values, above)
        found = as_columns(self.attention(n, block, place, queries, pair).forward())
        between = block.output(found)[0]
        between += x
        gate, up = block.gate_up(block.feed_forward_norm(between))
        after = block.down(swiglu(gate, up))[0]
        after += between
        if not self._keep:
            return Kept(x, pair), after
        return Kept(x, pair, queries, keys, found, between, gate, up), after

    def _pair(
        self,
        n: int,
        block: Block,
        place: int,
        keys: np.ndarray,
        values: np.ndarray,
        above: Kept | None,
    ) -> Pair:
        """Keys and values of the ancestors and, turned, of the level, from its columns."""
        model, ground = self._model, self.grounds[place]
        columns = (self._positioned(n, place, block.key_norm, keys), values)
        length, before = ground.level.tokens.shape[1], ground.valid.shape[1]
        made: list[np.ndarray] = []
        for i, own in enumerate(columns):
            both = room((ground.rows, model.kv_heads, before + length, model.head_dim))
            heads = as_heads(own, ground.rows, model.head_dim, model.kv_heads)
            both[:, :, before:] = heads[:, :, 0]
            if above is not None:
                both[:, :, :before] = above.pair[i][ground.level.parents]
            made.append(both)
        return made[0], made[1]

    def attention(
        self, n: int, block: Block, place: int, queries: np.ndarray, pair: Pair
    ) -> Attention:
        """The attention of a level in a block, from its queries' columns."""
        model, ground = self._model, self.grounds[place]
        turned = self._positioned(n, place, block.query_norm, queries)
        heads = as_heads(turned, ground.rows, model.head_dim, model.kv_heads)
        return Attention(heads, *pair, ground.mask, model.scale)

    def _positioned(self, n: int, place: int, norm: Norm | None, columns: np.ndarray) -> np.ndarray:
        """Queries or keys, normed and turned."""
        split = self.split(columns)
        rotary = self.rotary(n)
        turned = rotary.turn(split if norm is None else norm(split), self.tables(n, place))
        return turned.reshape(columns.shape)

    def split(self, columns: np.ndarray) -> np.ndarray:
        """(heads * head_dim, B) as (heads, head_dim, B)."""
        return columns.reshape(-1, self._model.head_dim, columns.shape[1])

    def rotary(self, n: int) -> Rotary:
        """Of block n."""
        return self._model.rotaries[n]

    def tables(self, n: int, place: int) -> Pair:
        """Of a level's positions in block n."""
        key = id(self.rotary(n)), place
        if key not in self._tables:
            self._tables[key] = self.rotary(n).tables(self.grounds[place].positions)
        return self._tables[key]


class _Back:
    """The way back through one block for one level."""

    def __init__(self, whole: Pass, n: int, place: int, kept: Kept) -> None:
        self._pass, self._n, self._place, self._kept = whole, n, place, kept
        self._block = whole.weights.blocks[n]

    def run(
        self, slope: np.ndarray, whole: tuple[np.ndarray, ...], further: bool
    ) -> tuple[np.ndarray, list[Pair], tuple[np.ndarray, ...]]:
        """Slopes by what entered, by the adapters, and by the ancestors' keys and values.

        whole: by the level's keys and values, ancestors included, from the levels below. Without
        `further` the first is not computed.
        """
        slope, feed_forward = self._feed_forward(slope)
        block, kept, one = self._block, self._kept, self._pass
        assert kept.found is not None
        assert kept.queries is not None
        assert kept.keys is not None
        by_found, output = block.output.back(kept.found, [slope])
        assert by_found is not None
        attention = one.attention(self._n, block, self._place, kept.queries, kept.pair)
        rows, kv_heads, _, size = attention.keys.shape
        folded = (as_heads(a, rows, size, kv_heads) for a in (kept.found, by_found))
        by_queries, by_keys, by_values = attention.back(*folded)
        by_keys += whole[0]
        by_values += whole[1]
        before = by_keys.shape[2] - one.grounds[self._place].level.tokens.shape[1]
        own = [as_columns(a[:, :, None, before:]) for a in (by_keys, by_values)]
        slopes = [
            self._unpositioned(block.query_norm, kept.queries, as_columns(by_queries)),
            self._unpositioned(block.key_norm, kept.keys, own[0]),
            own[1],
        ]
        normed = block.attention_norm(kept.entered)
        by_normed, first = block.queries_keys_values.back(normed, slopes, further)
        if by_normed is not None:
            slope += block.attention_norm.back(kept.entered, by_normed)
        ancestors = tuple(a[:, :, :before] for a in (by_keys, by_values))
        return slope, [*first, *output, *feed_forward], ancestors

    def _feed_forward(self, slope: np.ndarray) -> tuple[np.ndarray, list[Pair]]:
        """Slope by the states between, and by the adapters behind them."""
        block, kept = self._block, self._kept
        assert kept.gate is not None
        assert kept.up is not None
        assert kept.between is not None
        by_product, down = block.down.back(swiglu(kept.gate, kept.up), [slope])
        assert by_product is not None
        slopes = swiglu_back(kept.gate, kept.up, by_product)
        by_normed, gate_up = block.gate_up.back(block.feed_forward_norm(kept.between), slopes)
        assert by_normed is not None
        by_normed = block.feed_forward_norm.back(kept.between, by_normed)
        by_normed += slope
        return by_normed, [*gate_up, *down]

    def _unpositioned(self, norm: Norm | None, raw: np.ndarray, slope: np.ndarray) -> np.ndarray:
        one = self._pass
        slope = one.rotary(self._n).back(one.split(slope), one.tables(self._n, self._place))
        if norm is not None:
            slope = norm.back(one.split(raw), slope)
        return slope.reshape(raw.shape)


def _sums(one: Sequence[Pair], two: Sequence[Pair]) -> list[Pair]:
    return [(a + c, b + d) for (a, b), (c, d) in zip(one, two, strict=True)]


def _add_rows(
    whole: tuple[np.ndarray, ...], more: tuple[np.ndarray, ...], parents: np.ndarray
) -> None:
    """Add to each parent what its children have for it."""
    for total, part in zip(whole, more, strict=True):
        for row, parent in enumerate(parents):
            total[parent] += part[row]
