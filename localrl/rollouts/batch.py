"""The bookkeeping of a decode batch: requests, the rows being decoded, and what they have drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from localrl.backend import mx
from localrl.errors import LocalRLError
from localrl.rollouts.keys import keyed_uniforms


@dataclass(frozen=True)
class TreeRequest:
    """The completions of one prompt: roots that are drawn independently and may fork."""

    prompt: int
    """Index of the prompt."""
    address: tuple[int | str, ...]
    """Where its random numbers come from: (seed, step, example id)."""
    roots: int
    leaves: int
    """The most completions that forks may lead to; `roots` when there are none."""
    max_tokens: int
    """The longest completion."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens as it was drawn: the node of a tree. Arrays are (n,)."""

    tree: int
    """Index of its request."""
    parent: int
    """Index of the segment that it goes on from, -1 for a root. Parents come first."""
    siblings: int
    """How many were drawn alike at the fork; 1 for a root."""
    token_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    end: Literal["stop", "length", "fork"]


@dataclass(eq=False)
class Rows:
    """The rows being decoded: which segment each is writing, its next logits, the shared cache."""

    cache: list[Any]
    logits: mx.array  # (B, V)
    segments: np.ndarray  # (B,) index of the segment being written
    lengths: np.ndarray  # (B,) tokens on the path so far
    alive: np.ndarray  # (B,) bool; a finished row may ride along for a while

    def __len__(self) -> int:
        return len(self.segments)

    def take(self, keep: np.ndarray) -> None:
        """Keep these rows only; an index that repeats forks its row."""
        index = mx.array(keep)
        for layer in self.cache:
            layer.filter(index)
        self.logits = self.logits[index]
        self.segments, self.lengths = self.segments[keep], self.lengths[keep]
        self.alive = self.alive[keep]

    def extend(self, other: Rows) -> None:
        """Add the rows of another batch."""
        for layer, more in zip(self.cache, other.cache, strict=True):
            layer.extend(more)
        self.logits = mx.concatenate([self.logits, other.logits])
        self.segments = np.concatenate([self.segments, other.segments])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.alive = np.concatenate([self.alive, other.alive])


@dataclass(eq=False)
class _Open:
    """A segment while it is written."""

    tree: int
    parent: int
    siblings: int
    address: tuple[int | str, ...]
    """Where its random numbers come from; the last part is its name within the tree."""
    start: int
    """Tokens on the path before it."""
    room: int
    """Tokens that the path may still have."""
    forks: int
    """Forks on the path to it."""
    end: Literal["stop", "length", "fork"] = "fork"

    @cached_property
    def uniforms(self) -> np.ndarray:
        """(room,) numbers in (0, 1), one for each token."""
        return keyed_uniforms(self.room, *self.address)

    @cached_property
    def coins(self) -> np.ndarray:
        """(room,) numbers of another stream."""
        return keyed_uniforms(self.room, *self.address, "coins")


@dataclass(eq=False)
class Ledger:
    """Every segment begun so far, and every token drawn, in the order of drawing."""

    requests: Sequence[TreeRequest]
    open: list[_Open] = field(default_factory=list)
    leaves: np.ndarray = field(init=False)
    """(trees,) leaves begun, finished ones included."""
    finished: np.ndarray = field(init=False)
    """(trees,) leaves finished."""
    _drawn: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leaves = np.zeros(len(self.requests), np.int64)
        self.finished = np.zeros(len(self.requests), np.int64)

    def committed(self) -> int:
        """Rows that the trees begun may still need at once, forks to come included."""
        most = [request.leaves for request in self.requests]
        may_fork = np.array([request.leaves > request.roots for request in self.requests])
        growing = self.leaves > self.finished
        limit = np.where(may_fork & growing, most, self.leaves)
        return int((limit - self.finished).sum())

    def begin_root(self, tree: int, number: int) -> int:
        """The segment of one root of a tree."""
        return self._begin(tree, -1, 1, str(number), 0, 0)

    def fork(self, parent: int, length: int, children: int) -> list[int]:
        """Segments that go on from this one, whose path has that length; it ends there."""
        before = self.open[parent]
        self.leaves[before.tree] -= 1
        names = [f"{before.address[-1]}/{length}.{n}" for n in range(children)]
        return [
            self._begin(before.tree, parent, children, name, length, before.forks + 1)
            for name in names
        ]

    def _begin(
        self, tree: int, parent: int, siblings: int, name: str, start: int, forks: int
    ) -> int:
        request = self.requests[tree]
        address = (*request.address, name)
        room = request.max_tokens - start
        self.open.append(_Open(tree, parent, siblings, address, start, room, forks))
        self.leaves[tree] += 1
        return len(self.open) - 1

    def uniforms(self, rows: Rows) -> np.ndarray:
        """(B,) the number for the next token of each row; anything for a finished one."""
        segments = [self.open[s] for s in rows.segments]
        places = zip(segments, rows.lengths, strict=True)
        return np.array([s.uniforms[min(n - s.start, s.room - 1)] for s, n in places])

    def coins(self, rows: Rows) -> np.ndarray:
        """(B,) numbers in (0, 1) of another stream than the tokens', for fork rules."""
        segments = [self.open[s] for s in rows.segments]
        places = zip(segments, rows.lengths, strict=True)
        return np.array([s.coins[min(n - s.start, s.room - 1)] for s, n in places])

    def trees(self, rows: Rows) -> np.ndarray:
        """(B,) the tree of each row."""
        return np.array([self.open[s].tree for s in rows.segments])

    def write(
        self, rows: Rows, tokens: np.ndarray, logprobs: np.ndarray, entropies: np.ndarray
    ) -> None:
        """Write down the draws of living rows; their paths are a token longer.

        Raises: LocalRLError when a log-probability is not finite.
        """
        alive = rows.alive
        if not np.isfinite(logprobs[alive]).all():
            raise LocalRLError(
                "The model's logits are not finite, so nothing can be sampled from them. The "
                "adapter has diverged (lower learning.lr) or the model's weights are damaged."
            )
        self._drawn.append((rows.segments[alive], tokens[alive], logprobs[alive], entropies[alive]))
        rows.lengths[alive] += 1

    def finish(self, rows: Rows, stopped: np.ndarray) -> None:
        """End the segments of living rows that have drawn an end token or reached their limit."""
        limits = np.array([self.requests[self.open[s].tree].max_tokens for s in rows.segments])
        done = rows.alive & (stopped | (rows.lengths >= limits))
        for row in np.flatnonzero(done):
            segment = self.open[rows.segments[row]]
            segment.end = "stop" if stopped[row] else "length"
            self.finished[segment.tree] += 1
        rows.alive &= ~done

    def close(self) -> list[Segment]:
        """All segments with their tokens."""
        columns = [np.concatenate(column) for column in zip(*self._drawn, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        counts = np.bincount(columns[0], minlength=len(self.open))
        pieces = [np.split(column[order], np.cumsum(counts)[:-1]) for column in columns[1:]]
        return [
            Segment(s.tree, s.parent, s.siblings, *(column[i] for column in pieces), end=s.end)
            for i, s in enumerate(self.open)
        ]
