"""A forward pass over many positions in NumPy, and the gradient of the adapters.

The counterpart of `mlx.forest` and of MLX's gradient for models that `model` reads. Levels of a
forest go through the blocks together: a level's keys and values are those of its rows' parents,
gathered, and its own behind them. What the gradient needs is kept in this module's own records, one
for each block and level, and let go as the backward pass meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.engines.cpu.attention import Attention, as_columns, as_heads
from localrl.engines.cpu.levels import Ground
from localrl.engines.cpu.math import Norm, Pair, quiet, swiglu, swiglu_back
from localrl.engines.cpu.model import ArrayModel, Rotary
from localrl.engines.cpu.weights import Block
from localrl.policy.forest_packing import Level


@dataclass(frozen=True, eq=False)
class Kept:
    """What a block has made of a level, (.., R * L) columns but for keys and values."""

    entered: np.ndarray
    own: Pair
    """Keys and values (R, kv_heads, L, head_dim)."""
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
            above: Pair | None = None
            for place, x in enumerate(states):
                kept, above, states[place] = self._block(n, block, place, x, above)
                made.append(kept)
            if pairs is not None and above is not None:
                pairs.append(above)
            if self._keep and n >= self._lowest:
                self._kept.append(made)
        return np.concatenate(states, axis=1)

    @quiet
    def back(self, slope: np.ndarray) -> list[Pair]:
        """Slopes by lora_a and lora_b of `ArrayModel.adapters`, from that by the states."""
        edges = np.cumsum([ground.level.tokens.size for ground in self.grounds])[:-1]
        slopes = [np.ascontiguousarray(part) for part in np.split(slope, edges, axis=1)]
        found: list[list[Pair]] = []
        for n in reversed(range(self._lowest, len(self.weights.blocks))):
            found.append(self._block_back(n, slopes))
        return [pair for pairs in reversed(found) for pair in pairs]

    def _block_back(self, n: int, slopes: list[np.ndarray]) -> list[Pair]:
        """Slopes by a block's adapters; `slopes` by what leaves it become those by what enters."""
        kept, total = self._kept.pop(), list[Pair]()
        pairs: list[Pair] = []
        for ground, one in zip(self.grounds, kept, strict=True):
            pairs.append(ground.behind(one.own, pairs[-1] if pairs else None))
        below: Pair | None = None
        for place in reversed(range(len(kept))):
            above = pairs[place - 1] if place else None
            back = _Back(self, n, place, self._again(n, place, kept.pop(), above), pairs.pop())
            slopes[place], mine, by_pair = back.run(slopes[place], below, n > self._lowest)
            if above is not None:
                below = self.grounds[place].gather(by_pair, above)
            total = _sums(total, mine) if total else mine
            del back
        return total

    def _again(self, n: int, place: int, kept: Kept, above: Pair | None) -> Kept:
        """What the block made of the level, computed once more where it was not kept."""
        if kept.queries is not None:
            return kept
        block = self.weights.blocks[n]
        return self._block(n, block, place, kept.entered, above, whole=True)[0]

    def _block(
        self,
        n: int,
        block: Block,
        place: int,
        x: np.ndarray,
        above: Pair | None,
        whole: bool = False,
    ) -> tuple[Kept, Pair, np.ndarray]:
        """What is kept of a level in a block, its keys and values, and the states after it.

        above: keys and values of the level above. whole: keep all that the way back needs.
        """
        queries, keys, values = block.queries_keys_values(block.attention_norm(x))
        own = self._heads(place, self._positioned(n, place, block.key_norm, keys))
        own = own, self._heads(place, values)
        pair = self.grounds[place].behind(own, above)
        found = as_columns(self.attention(n, block, place, queries, pair).forward())
        kept = Kept(x, own)
        whole = whole or (self._keep and not self._recompute)
        if whole:
            kept = replace(kept, queries=queries, keys=keys, found=found)
        del queries, keys, values
        between = block.output(found)[0]
        between += x
        gate, up = block.gate_up(block.feed_forward_norm(between))
        after = block.down(swiglu(gate, up))[0]
        after += between
        return replace(kept, between=between, gate=gate, up=up) if whole else kept, pair, after

    def _heads(self, place: int, columns: np.ndarray) -> np.ndarray:
        """Columns of keys or values as (R, kv_heads, L, head_dim)."""
        model, rows = self._model, self.grounds[place].rows
        return as_heads(columns, rows, model.head_dim, model.kv_heads)[:, :, 0]

    def attention(
        self, n: int, block: Block, place: int, queries: np.ndarray, pair: Pair
    ) -> Attention:
        """The attention of a level in a block, from its queries' columns."""
        model, ground = self._model, self.grounds[place]
        turned = self._positioned(n, place, block.query_norm, queries)
        heads = as_heads(turned, ground.rows, model.head_dim, model.kv_heads)
        return Attention(heads, *pair, ground.valid, model.scale)

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

    def __init__(self, whole: Pass, n: int, place: int, kept: Kept, pair: Pair) -> None:
        self._pass, self._n, self._place = whole, n, place
        self._kept, self._pair = kept, pair
        self._block = whole.weights.blocks[n]

    def run(
        self, slope: np.ndarray, below: Pair | None, further: bool
    ) -> tuple[np.ndarray, list[Pair], Pair]:
        """Slopes by what entered, by the adapters, and by keys and values, ancestors included.

        below: by the level's keys and values, from the levels below it. Without `further` the first
        is not computed.
        """
        slope, feed_forward = self._feed_forward(slope)
        block, kept, one = self._block, self._kept, self._pass
        assert kept.found is not None
        assert kept.queries is not None
        assert kept.keys is not None
        by_found, output = block.output.back(kept.found, [slope])
        assert by_found is not None
        by_queries, by_pair = self._attention(kept.queries, kept.found, by_found, below)
        length = one.grounds[self._place].level.tokens.shape[1]
        own = [as_columns(array[:, :, None, -length:]) for array in by_pair]
        slopes = [
            self._unpositioned(block.query_norm, kept.queries, by_queries),
            self._unpositioned(block.key_norm, kept.keys, own[0]),
            own[1],
        ]
        normed = block.attention_norm(kept.entered)
        by_normed, first = block.queries_keys_values.back(normed, slopes, further)
        if by_normed is not None:
            slope += block.attention_norm.back(kept.entered, by_normed)
        return slope, [*first, *output, *feed_forward], by_pair

    def _attention(
        self, queries: np.ndarray, found: np.ndarray, by_found: np.ndarray, below: Pair | None
    ) -> tuple[np.ndarray, Pair]:
        """Slopes by the turned queries' columns, and by keys and values."""
        attention = self._pass.attention(self._n, self._block, self._place, queries, self._pair)
        rows, kv_heads, _, size = attention.keys.shape
        folded = (as_heads(array, rows, size, kv_heads) for array in (found, by_found))
        by_queries, by_keys, by_values = attention.back(*folded)
        if below is not None:
            by_keys += below[0]
            by_values += below[1]
        return as_columns(by_queries), (by_keys, by_values)

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
