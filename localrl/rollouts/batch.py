"""The bookkeeping of a decode batch: requests, the rows being decoded, and what they have drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from localrl.errors import LocalRLError
from localrl.policy.engine import DecodeState
from localrl.policy.tokenizer import Tokenizer
from localrl.records import FinishReason, Leaf, Node
from localrl.rollouts.stops import Early, RecentTokens
from localrl.utils.rng import keyed_uniforms

EndReason = Literal["stop", "length", "fork"] | Early
"""Why a segment ended."""


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
    first_root: int = 0
    """Number of its first root: the roots of earlier rounds come before it."""
    expected_tokens: float | None = None
    """How long a completion is thought to be; None: nothing is known of this prompt."""
    before: tuple[int, ...] = ()
    """Tokens at the end of the prompt that belong to the completion, for rules that end it."""


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
    end: EndReason

    def node(self, parent: int, version: int, round: int = 0) -> Node:
        """Its record in a group, behind the node with that index there."""
        return Node(
            parent=parent,
            token_ids=self.token_ids,
            sampled=np.ones(len(self.token_ids), bool),
            sampled_logprobs=self.logprobs,
            entropies=self.entropies,
            cond_weight=1 / self.siblings,
            version=version,
            round=round,
        )


def end_leaf(node: int, ids: Sequence[int], reason: FinishReason, tokenizer: Tokenizer) -> Leaf:
    """The leaf of a completion with these tokens; its text is without the end token."""
    return Leaf(node, reason, tokenizer.decode(ids[:-1] if reason == "stop" else ids))


@dataclass(eq=False)
class Rows:
    """The rows being decoded: which segment each is writing, and what computes its next token."""

    state: DecodeState
    segments: np.ndarray  # (B,) index of the segment being written
    lengths: np.ndarray  # (B,) tokens on the path so far
    alive: np.ndarray  # (B,) bool; a finished row may ride along for a while
    tails: RecentTokens | None = None  # None: no rule asks for it

    def __len__(self) -> int:
        return len(self.segments)

    def take(self, keep: np.ndarray) -> None:
        """Keep these rows only; an index that repeats forks its row."""
        self.state.select(keep)
        self.segments, self.lengths = self.segments[keep], self.lengths[keep]
        self.alive = self.alive[keep]
        if self.tails is not None:
            self.tails.take(keep)

    def extend(self, other: Rows) -> None:
        """Add the rows of another batch."""
        self.state.extend(other.state)
        self.segments = np.concatenate([self.segments, other.segments])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.alive = np.concatenate([self.alive, other.alive])
        if self.tails is not None and other.tails is not None:
            self.tails.extend(other.tails)


@dataclass(eq=False)
class _OpenSegment:
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
    end: EndReason = "fork"

    @cached_property
    def uniforms(self) -> np.ndarray:
        """(room,) numbers in (0, 1), one for each token."""
        return keyed_uniforms(self.room, *self.address)

    @cached_property
    def coins(self) -> np.ndarray:
        """(room,) numbers of another stream."""
        return keyed_uniforms(self.room, *self.address, "coins")


@dataclass(eq=False)
class DecodeLog:
    """Every segment begun so far, and every token drawn, in the order of drawing."""

    requests: Sequence[TreeRequest]
    open: list[_OpenSegment] = field(default_factory=list)
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

    def request(self, segment: int) -> TreeRequest:
        """The request that a segment belongs to."""
        return self.requests[self.open[segment].tree]

    def begin_root(self, tree: int, number: int) -> int:
        """The segment of one root of a tree."""
        return self._begin(tree, -1, 1, str(self.requests[tree].first_root + number), 0, 0)

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
        self.open.append(_OpenSegment(tree, parent, siblings, address, start, room, forks))
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

    def finish(self, rows: Rows, ended: Mapping[EndReason, np.ndarray]) -> None:
        """End the segments of living rows that a reason ends, or that have reached their limit.

        `ended` holds (B,) bool for each reason; of several, the first counts, and length is last.
        """
        limits = np.array([self.request(s).max_tokens for s in rows.segments])
        done = rows.alive & (np.any([*ended.values()], axis=0) | (rows.lengths >= limits))
        for row in np.flatnonzero(done):
            segment = self.open[rows.segments[row]]
            segment.end = next((reason for reason, hit in ended.items() if hit[row]), "length")
            self.finished[segment.tree] += 1
        rows.alive &= ~done

    def close(self) -> list[Segment]:
        """All segments with their tokens."""
        if not self.open:
            return []
        columns = [np.concatenate(column) for column in zip(*self._drawn, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        counts = np.bincount(columns[0], minlength=len(self.open))
        pieces = [np.split(column[order], np.cumsum(counts)[:-1]) for column in columns[1:]]
        return [
            Segment(s.tree, s.parent, s.siblings, *(column[i] for column in pieces), end=s.end)
            for i, s in enumerate(self.open)
        ]
