"""Decoding on the CPU: one token of every row at a time, in NumPy on MLX's own memory.

MLX's CPU backend takes tens of microseconds per operation and about 20 ns per exponential; NumPy
takes about one of each. A small model's token is hundreds of operations, so it is computed here,
with the arithmetic of mlx-lm's families and the same BLAS.

Rows of one prompt can share its keys and values, as in `mlx.prefix_cache`: then all rows of a
prompt are multiplied by them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from localrl.engines.cpu.attention import steps_for
from localrl.engines.cpu.buffers import persistent_zeros, release_all
from localrl.engines.cpu.forward import ForwardPass
from localrl.engines.cpu.math import KV, RopeTables, ignore_overflow, softmax, swiglu
from localrl.engines.cpu.model import CPUModel
from localrl.engines.cpu.sampling import draw, entropy
from localrl.engines.cpu.weights import Block, Weights
from localrl.policy.engine import Sampled
from localrl.policy.forest_packing import Level

STEP = 64
"""Number of tokens by which buffers grow."""


@dataclass(frozen=True, eq=False)
class CPUPrefilled:
    """Prefilled prompts (P) that rows continue: see `Prefilled`."""

    layers: list[KV]
    """Keys and values (P, kv_heads, L, head_dim) in every layer, padded on the right."""
    lengths: np.ndarray
    """Lengths (P,) of the prompts."""
    weights: Weights
    """Weights for decoding."""
    model: CPUModel
    last: np.ndarray
    """Logits (P, V) after each prompt."""

    def fork(self, rows: np.ndarray, prompts: Sequence[int] | None) -> CPUState:
        """Create a state of rows that continue the prompts: see `Prefilled.fork`."""
        return CPUState(self, rows, prompts)

    def logits(self) -> np.ndarray:
        """Float32 logits (P, V)."""
        return self.last


@ignore_overflow
def prefill(model: CPUModel, tokens: np.ndarray, lengths: np.ndarray) -> CPUPrefilled:
    """Run right-padded prompts (P, L)."""
    level = Level(tokens, lengths, np.zeros(0, np.int32))
    one = ForwardPass(model, [level], keep=False)
    pairs: list[KV] = []
    states = one.forward(pairs)[:, np.arange(len(lengths)) * tokens.shape[1] + lengths - 1]
    logits = one.weights.logits(np.ascontiguousarray(states))
    release_all()
    return CPUPrefilled(pairs, lengths, model.for_decoding(one.weights), model, logits)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Keys and values (kv_heads, L, head_dim) of one prompt in every layer."""

    key: int
    layers: tuple[KV, ...]
    length: int


class CPUState:
    """Keys and values that rows have written in every layer, and their next logits.

    See `DecodeState`. It uses the weights of the prefill.
    """

    def __init__(
        self, prefilled: CPUPrefilled, rows: np.ndarray, prompts: Sequence[int] | None
    ) -> None:
        """rows (B,): the prompt that each row continues; prompts: see `Prefilled.fork`."""
        self._model, self._weights = prefilled.model, prefilled.weights
        self._next = prefilled.last[rows]
        self.prompts: list[Prompt] = []
        self._rows_by_prompt: list[tuple[int, slice | np.ndarray]] = []
        self._addresses = np.zeros((0, 0, 4), np.int64)
        """Addresses (layers, B, 4) of each row's prompt, as `attend_token` in C takes them."""
        own = prefilled.lengths[rows].astype(np.int64)
        self.sources, none = rows, np.zeros(len(rows), int)
        self.starts, self.lengths = (none, own) if prompts is None else (own, none)
        tokens = _whole(int(self.lengths.max()) + 1)
        shape = (len(rows), self._model.kv_heads, tokens, self._model.head_dim)
        if prompts is None:
            self._layers = [_copied(pair, shape, rows, own) for pair in prefilled.layers]
            return
        for place, (key, length) in enumerate(zip(prompts, prefilled.lengths, strict=True)):
            parts = tuple((k[place, :, :length], v[place, :, :length]) for k, v in prefilled.layers)
            self.prompts.append(Prompt(key, parts, int(length)))
        self._layers = [
            (persistent_zeros(shape), persistent_zeros(shape)) for _ in prefilled.layers
        ]
        self._group_rows()

    def __len__(self) -> int:
        return len(self.lengths)

    @ignore_overflow
    def step(self, tokens: np.ndarray) -> None:
        """Feed one more token (B,) to each row."""
        self._grow(int(self.lengths.max()) + 1)
        weights, positions = self._weights, self.starts + self.lengths
        tables = {id(rope): rope.tables(positions) for rope in self._model.ropes}
        mask = None if self._steps is not None else self._mask()
        x = np.ascontiguousarray(weights.embedding[tokens].T)  # (d, B)
        for n, block in enumerate(weights.blocks):
            rope_tables = tables[id(self._model.ropes[n])]
            found = self._attend(n, block, block.attention_norm(x), rope_tables, mask)
            x += block.output(found)[0]
            gate, up = block.gate_up(block.feed_forward_norm(x))
            x += block.down(swiglu(gate, up))[0]
        self.lengths += 1
        self._next = weights.logits(x)

    def wait(self) -> None:
        """Do nothing: computation here is never deferred."""

    def logits(self) -> np.ndarray:
        """Float32 logits (B, V)."""
        return self._next

    def sample(
        self, uniforms: np.ndarray | None, temperature: float, *, ahead: bool = False
    ) -> Sampled:
        """Sample one token per row."""
        drawn = Sampled(*draw(self._next, uniforms, temperature))
        if ahead:
            self.step(drawn.tokens)
        return drawn

    def entropies(self, temperature: float) -> np.ndarray:
        """Entropy (B,) in nats of each row's next-token distribution."""
        return entropy(self._next, temperature)

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows; an index that repeats forks its row."""
        self._next = self._next[rows]
        used = int(self.lengths.max())
        pick = _close if (np.diff(rows) > 0).all() else _gather
        for n, (keys, values) in enumerate(self._layers):  # one at a time, to save memory
            self._layers[n] = pick(keys, rows, used), pick(values, rows, used)
        self.sources, self.starts = self.sources[rows], self.starts[rows]
        self.lengths = self.lengths[rows]
        self._group_rows()

    def extend(self, other: CPUState) -> None:
        """Add the rows of another state, and those of its prompts that are new."""
        self._next = np.concatenate([self._next, other._next])
        used = int(max(self.lengths.max(), other.lengths.max()))
        for n, (keys, values) in enumerate(self._layers):
            more = other._layers[n]
            self._layers[n] = _join(keys, more[0], used), _join(values, more[1], used)
        places = self._adopt(other.prompts)
        sources = places[other.sources] if len(places) else other.sources
        self.sources = np.concatenate([self.sources, sources])
        self.starts = np.concatenate([self.starts, other.starts])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self._group_rows()

    def _adopt(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Add the prompts that are new; return the index of each."""
        keys = [prompt.key for prompt in self.prompts]
        self.prompts += [prompt for prompt in prompts if prompt.key not in keys]
        keys = [prompt.key for prompt in self.prompts]
        return np.array([keys.index(prompt.key) for prompt in prompts], int)

    def _group_rows(self) -> None:
        """Group rows by the prompt they continue; prompts without rows are dropped."""
        if not self.prompts:
            return
        used, self.sources = np.unique(self.sources, return_inverse=True)
        self.prompts = [self.prompts[place] for place in used]
        self._rows_by_prompt = [
            (place, _rows_of(np.flatnonzero(self.sources == place))) for place in range(len(used))
        ]
        places = np.array([_addresses(prompt) for prompt in self.prompts], np.int64)
        self._addresses = np.ascontiguousarray(places[self.sources].swapaxes(0, 1))

    def _grow(self, tokens: int) -> None:
        """Make room for this many tokens in each row, one layer at a time."""
        if tokens <= self._layers[0][0].shape[2]:
            return
        everything = np.arange(len(self))
        for n, pair in enumerate(self._layers):
            keys, values = (_gather(a, everything, tokens - 1, tokens) for a in pair)
            self._layers[n] = keys, values

    def _mask(self) -> np.ndarray | None:
        """Additive mask, 0 or -inf, (B, 1, 1, prompts + tails); None if nothing is masked."""
        last = int(self.lengths.max())
        most = max((prompt.length for prompt in self.prompts), default=0)
        if (self.lengths == last).all() and (not most or (self.starts == most).all()):
            return None
        allowed = np.arange(last + 1) <= self.lengths[:, None]
        if most:
            allowed = np.concatenate([np.arange(most) < self.starts[:, None], allowed], axis=1)
        return np.where(allowed, np.float32(0), np.float32(-np.inf))[:, None, None]

    def _attend(
        self, n: int, block: Block, x: np.ndarray, tables: RopeTables, mask: np.ndarray | None
    ) -> np.ndarray:
        """Attention output (heads * head_dim, B) for normed hidden states (d, B) of layer n."""
        model, rotate, rows = self._model, self._model.ropes[n].rotate, x.shape[1]
        queries, keys, values = (
            y.reshape(-1, model.head_dim, rows) for y in block.queries_keys_values(x)
        )
        if block.query_norm is not None and block.key_norm is not None:
            queries, keys = block.query_norm(queries), block.key_norm(keys)
        keys, queries = rotate(keys, tables), rotate(queries, tables)
        if (c := self._steps) is not None:
            return self._attend_in_c(c, n, queries, keys, values)
        self._write(n, keys, values)
        queries *= np.float32(model.scale)
        queries = np.ascontiguousarray(queries.transpose(2, 0, 1))
        found = self._find(n, queries.reshape(rows, model.kv_heads, -1, model.head_dim), mask)
        return found.reshape(rows, -1).T

    @property
    def _steps(self) -> ModuleType | None:
        """The C kernels, if they compute the attention."""
        return steps_for(self._model.head_dim)

    def _attend_in_c(
        self, c: ModuleType, n: int, queries: np.ndarray, keys: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Do the same as `_write` and `_find`, on columns."""
        found = np.empty((queries.size // len(self), len(self)), np.float32)
        prompts = self._addresses[n] if self.prompts else None
        new = queries, keys, np.ascontiguousarray(values)
        c.attend_token(*new, *self._layers[n], self.lengths, found, prompts, self._model.scale)
        return found

    def _write(self, n: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Append one token's keys and values, (kv_heads, head_dim, B) each, to every row."""
        places = self.lengths
        for buffer, new in zip(self._layers[n], (keys, values), strict=True):
            if (places == places[0]).all():
                buffer[:, :, places[0]] = new.transpose(2, 0, 1)
            else:
                buffer[np.arange(len(places)), :, places] = new.transpose(2, 0, 1)

    def _find(self, n: int, queries: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Attention output (B, kv_heads, r, head_dim), one softmax over prompt and tail."""
        last = int(self.lengths.max()) + 1
        keys, values = (buffer[:, :, :last] for buffer in self._layers[n])
        if not self.prompts:
            scores = queries @ keys.swapaxes(-1, -2)
            return softmax(scores, mask) @ values
        most = max(prompt.length for prompt in self.prompts)
        scores = np.zeros((*queries.shape[:3], most + last), np.float32)
        np.matmul(queries, keys.swapaxes(-1, -2), out=scores[..., most:])
        for prompt, rows in self._groups():
            scores[rows, ..., : prompt.length] = _over(
                queries[rows], prompt.layers[n][0].swapaxes(-1, -2)
            )
        softmax(scores, mask)
        found = scores[..., most:] @ values
        for prompt, rows in self._groups():
            found[rows] += _over(scores[rows, ..., : prompt.length], prompt.layers[n][1])
        return found

    def _groups(self) -> Iterator[tuple[Prompt, slice | np.ndarray]]:
        return ((self.prompts[place], rows) for place, rows in self._rows_by_prompt)


def _addresses(prompt: Prompt) -> list[tuple[int, int, int, int]]:
    """For every layer: addresses of keys and values, prompt length, and stride between heads."""
    return [
        (_address(keys), _address(values), prompt.length, keys.strides[0] // keys.itemsize)
        for keys, values in prompt.layers
    ]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _over(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Multiply (n, kv_heads, r, a) by (kv_heads, a, b), one product per head."""
    n, heads, r, a = rows.shape
    folded = rows.swapaxes(0, 1).reshape(heads, n * r, a)
    return (folded @ matrix).reshape(heads, n, r, -1).swapaxes(0, 1)


def _whole(tokens: int) -> int:
    """Round a number of tokens up to whole steps."""
    return -(-tokens // STEP) * STEP


def _copied(pair: KV, shape: tuple[int, ...], rows: np.ndarray, lengths: np.ndarray) -> KV:
    """Copy these rows of a prefilled layer's keys and values."""
    keys, values = persistent_zeros(shape), persistent_zeros(shape)
    for new, old in zip((keys, values), pair, strict=True):
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            new[i, :, :length] = old[row, :, :length]
    return keys, values


def _gather(buffer: np.ndarray, keep: np.ndarray, used: int, tokens: int = 1) -> np.ndarray:
    """Copy the first `used` tokens of these rows to a new buffer with room for `tokens`."""
    heads, size = buffer.shape[1], buffer.shape[3]
    new = persistent_zeros((len(keep), heads, max(buffer.shape[2], _whole(tokens)), size))
    for i, row in enumerate(keep):
        new[i, :, :used] = buffer[row, :, :used]
    return new


def _close(buffer: np.ndarray, keep: np.ndarray, used: int) -> np.ndarray:
    """Move these rows, ascending, to the front of the same buffer."""
    for i, row in enumerate(keep):
        if i != row:
            buffer[i, :, :used] = buffer[row, :, :used]
    return buffer[: len(keep)]


def _join(one: np.ndarray, two: np.ndarray, used: int) -> np.ndarray:
    """Join the rows of two buffers, with room for more than `used` tokens."""
    heads, size = one.shape[1], one.shape[3]
    new = persistent_zeros((len(one) + len(two), heads, _whole(used + 1), size))
    for start, old in ((0, one), (len(one), two)):
        length = min(used, old.shape[2])
        new[start : start + len(old), :, :length] = old[:, :, :length]
    return new


def _rows_of(index: np.ndarray) -> slice | np.ndarray:
    """Convert consecutive row indices to a slice, which gives a view instead of a copy."""
    follows = len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index)))
    return slice(int(index[0]), int(index[-1]) + 1) if follows else index
