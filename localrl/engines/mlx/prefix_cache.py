"""Prompts stored once: rows of one prompt read the same keys and values of it.

mlx-lm's cache of a batch has the whole prompt in every row. Here a full-attention layer stores the
prompts separately, and for each row only its own tail. A decode step multiplies all rows of a
prompt by its keys at once, so these are read once per step, and puts the scores of prompt and tail
side by side under one softmax. Layers with other caches (windows, convolutions, recurrent state)
keep mlx-lm's. Papers: Hydragen (arXiv 2402.05099), ChunkAttention (2402.15220).
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from localrl.backend import mx

COPIED_BYTES = 256 * 2**20
"""Keys and values of copied prompts that a GPU reads in the time that sharing them takes. An
estimate, not measured: a dozen more kernels in each of 30 blocks are 1 to 2 ms, in which Macs read
100 to 800 MB."""


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """The keys and values of P prompts in one layer, padded on the left to the longest."""

    prompt_keys: tuple[int, ...]
    """Unique key of each prompt."""
    keys: mx.array  # (P, heads, L, head_dim)
    values: mx.array
    lengths: np.ndarray  # (P,) int

    @cached_property
    def mask(self) -> mx.array | None:
        """Mask (P, 1, 1, L) to add to scores; None if all prompts have the same length."""
        length = self.keys.shape[2]
        if (self.lengths == length).all():
            return None
        padding = mx.array(length - self.lengths)
        tokens = mx.arange(length) >= padding[:, None]
        return _added(tokens[:, None, None], self.keys.dtype)

    def take(self, rows: np.ndarray) -> SharedPrompts:
        """Select these prompts, without a copy if they are all."""
        if np.array_equal(rows, np.arange(len(self.prompt_keys))):
            return self
        lengths = self.lengths[rows]
        start, index = self.keys.shape[2] - int(lengths.max()), mx.array(rows)
        keys, values = (array[index][:, :, start:] for array in (self.keys, self.values))
        return SharedPrompts(tuple(self.prompt_keys[i] for i in rows), keys, values, lengths)

    def join(self, other: SharedPrompts) -> tuple[SharedPrompts, np.ndarray]:
        """Join both without duplicates; also return the index of each of the other's prompts."""
        new = np.array([name not in self.prompt_keys for name in other.prompt_keys])
        if not new.any():
            return self, np.array([self.prompt_keys.index(name) for name in other.prompt_keys])
        more = other.take(np.flatnonzero(new))
        most = max(self.keys.shape[2], more.keys.shape[2])
        keys, values = (
            mx.concatenate([_lengthen(one, most), _lengthen(two, most)])
            for one, two in ((self.keys, more.keys), (self.values, more.values))
        )
        prompt_keys = self.prompt_keys + more.prompt_keys
        both = SharedPrompts(
            prompt_keys, keys, values, np.concatenate([self.lengths, more.lengths])
        )
        return both, np.array([prompt_keys.index(name) for name in other.prompt_keys])


def _lengthen(array: mx.array, length: int) -> mx.array:
    """Pad an array on the left along the third axis."""
    more = length - array.shape[2]
    return mx.pad(array, [(0, 0), (0, 0), (more, 0), (0, 0)]) if more else array


class RowsByPrompt:
    """Rows grouped by prompt: P prompts with as many slots each as the fullest one needs."""

    def __init__(self, rows: np.ndarray, prompts: int) -> None:
        counts = np.bincount(rows, minlength=prompts)
        order = np.argsort(rows, kind="stable")
        first = np.cumsum(counts) - counts
        self.each = int(counts.max())
        slot = np.empty(len(rows), int)
        slot[order] = np.arange(len(rows)) - np.repeat(first, counts)
        slot += rows * self.each
        self._assign = self._row = None
        if len(rows) < prompts * self.each or (slot != np.arange(len(rows))).any():
            row = np.zeros(prompts * self.each, int)  # results of empty slots are never read
            row[slot] = np.arange(len(rows))
            self._assign, self._row = mx.array(slot), mx.array(row)

    def group(self, array: mx.array) -> mx.array:
        """Arrange rows (B, heads, n, d) in slots (P, heads, each * n, d)."""
        heads, n, d = array.shape[1:]
        array = array if self._row is None else array[self._row]
        array = array.reshape(-1, self.each, heads, n, d)
        return array.swapaxes(1, 2).reshape(-1, heads, self.each * n, d)

    def ungroup(self, array: mx.array) -> mx.array:
        """Invert `group`."""
        heads, n, d = array.shape[1], array.shape[2] // self.each, array.shape[3]
        array = array.reshape(-1, heads, self.each, n, d).swapaxes(1, 2)
        array = array.reshape(-1, heads, n, d)
        return array if self._assign is None else array[self._assign]


class PrefixCache:
    """One layer's cache of rows that continue prompts, in place of mlx-lm's BatchKVCache.

    It takes one token of each row at a time.
    """

    def __init__(self, prompts: SharedPrompts, rows: np.ndarray, step: int) -> None:
        from mlx_lm.models.cache import BatchKVCache

        self.tail = BatchKVCache([0] * len(rows))
        """Keys and values of the rows' own tokens; its offsets include the prompts."""
        self.tail.step = step
        self.tail.offset = mx.array(prompts.lengths[rows])
        self._fetched: mx.array | None = None
        self._ragged = False
        self._assign(prompts, rows)

    def _assign(self, prompts: SharedPrompts, rows: np.ndarray) -> None:
        """Keep the prompts that rows (B,) still continue."""
        used, self.rows = np.unique(rows, return_inverse=True)
        self.prompts = prompts.take(used)
        self.by_prompt = RowsByPrompt(self.rows, len(used))
        self.attended = True
        """True if attention has read the prompts since the last token."""

    @property
    def offset(self) -> mx.array:
        """Rope position (B,) of the next token."""
        return self.tail.offset

    @property
    def state(self) -> list[mx.array]:
        """All arrays of the cache."""
        tail = [self.tail.keys, self.tail.values, self.tail.offset]
        return [self.prompts.keys, self.prompts.values, *(a for a in tail if a is not None)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a token of each row (B, heads, 1, head_dim); return the tails including it.

        Raises: ValueError for several tokens, or if attention did not run after the last one.
        """
        if keys.shape[2] != 1 or not self.attended:
            raise ValueError("shared prompts support attention of one token at a time only")
        self.attended = False
        tails = self.tail.update_and_fetch(keys, values)
        self._fetched = tails[0]
        _OWNERS[id(self._fetched)] = self
        return tails

    def make_mask(self, n: int, window_size: int | None = None, **_: Any) -> mx.array | None:
        """Mask (B, 1, 1, T) to add to the tails' scores; None if all have the same length.

        Raises: ValueError for windows.
        """
        if window_size is not None:
            raise ValueError("shared prompts support attention without windows only")
        return _added(self.tail.make_mask(n), self.prompts.keys.dtype) if self._ragged else None

    @staticmethod
    def owner(keys: mx.array) -> PrefixCache | None:
        """Return the cache that has returned these keys last, for layers that share another's."""
        found = _OWNERS.get(id(keys))
        return found if found is not None and found._fetched is keys else None

    def filter(self, indices: mx.array) -> None:
        """Keep these rows; an index that repeats forks its row."""
        self.tail.filter(indices)
        self._assign(self.prompts, self.rows[np.array(indices)])
        self._look()

    def extend(self, other: PrefixCache) -> None:
        """Add the rows of another cache, and those of its prompts that are new."""
        self.tail.extend(other.tail)
        prompts, places = self.prompts.join(other.prompts)
        self._assign(prompts, np.concatenate([self.rows, places[other.rows]]))
        self._look()

    def _look(self) -> None:
        self._ragged = bool(self.tail.left_padding.max().item())


_OWNERS: weakref.WeakValueDictionary[int, PrefixCache] = weakref.WeakValueDictionary()
"""Caches by the id of the keys that they have returned last."""


def fork_prompts(
    cache: Sequence[Any], rows: np.ndarray, prompt_keys: Sequence[int] | None
) -> list[Any]:
    """Create a cache of B rows that continue the prompts of a prefilled one, which is unchanged.

    rows: (B,) int, the row of the prefilled cache that each continues. prompt_keys: keys of its
    prompts, so that layers of plain keys and values store them once; None: each row gets a copy, as
    it does in all other layers.
    """
    from mlx_lm.models.cache import BatchKVCache

    forked: list[Any] = []
    for layer in cache:
        if prompt_keys is not None and type(layer) is BatchKVCache:
            keys, values = layer.keys_and_values()
            lengths = keys.shape[2] - np.array(layer.left_padding)
            prompts = SharedPrompts(tuple(prompt_keys), keys, values, lengths)
            forked.append(PrefixCache(prompts, rows, layer.step))
        else:
            # The copy shares its arrays; filtering rebinds them and leaves the prefilled ones.
            copied = copy.deepcopy(layer)
            copied.filter(mx.array(rows))
            forked.append(copied)
    return forked


def copied_positions(cache: Sequence[Any]) -> int:
    """Return how many positions of prompts a GPU should rather copy than share, from a cache."""
    layers = [layer.prompts for layer in cache if isinstance(layer, PrefixCache)]
    arrays = [array for prompts in layers for array in (prompts.keys, prompts.values)]
    size = sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in arrays)
    return COPIED_BYTES // max(size, 1)


def use_shared_prompts(model: Any) -> None:
    """Let the model's families attend to a `PrefixCache`, if they use mlx-lm's attention.

    The name is rebound in the modules that define them, so this affects every model of these
    families in this process; with any other cache it is mlx-lm's attention as before.
    """
    from mlx_lm.models import base

    for name in {type(module).__module__ for module in model.modules()}:
        family = sys.modules[name]
        if getattr(family, "scaled_dot_product_attention", None) is (
            base.scaled_dot_product_attention
        ):
            family.__dict__["scaled_dot_product_attention"] = _dispatch


def _dispatch(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, *args: Any, **options: Any
) -> mx.array:
    from mlx_lm.models import base

    cache = PrefixCache.owner(keys) if cache is None else cache
    attention = _attend if isinstance(cache, PrefixCache) else base.scaled_dot_product_attention
    return attention(queries, keys, values, cache, *args, **options)


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: PrefixCache,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of one token of each row (B, H, 1, D) to its prompt and tail."""
    if sinks is not None or queries.shape[2] != 1 or (mask is not None and mask.dtype == mx.bool_):
        raise ValueError("shared prompts support plain attention of one token at a time only")
    cache.attended = True
    prompts, by_prompt = cache.prompts, cache.by_prompt
    rows, heads, _, size = queries.shape
    queries = (queries * scale).reshape(rows, keys.shape[1], -1, size)
    before = _scores(by_prompt.group(queries), prompts.keys, prompts.mask)
    scores = mx.concatenate([by_prompt.ungroup(before), _scores(queries, keys, mask)], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    to_prompt, to_tail = mx.split(weights, [prompts.keys.shape[2]], axis=-1)
    found = by_prompt.ungroup(by_prompt.group(to_prompt) @ prompts.values)
    return mx.addmm(found, to_tail, values).reshape(rows, heads, 1, -1)


def _scores(queries: mx.array, keys: mx.array, mask: mx.array | None) -> mx.array:
    keys = keys.swapaxes(-1, -2)
    return queries @ keys if mask is None else mx.addmm(mask, queries, keys)


def _added(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """Turn a mask that is True at tokens into one to add: 0 there, the lowest number elsewhere."""
    return mx.where(mask, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
