"""Bookkeeping of a decode batch: requests, the rows being decoded, and the tokens drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from localrl.errors import LocalRLError
from localrl.policy.engine import DecodeState
from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, FinishReason, Leaf, Node, Work
from localrl.rollouts.stops import Early, RecentTokens
from localrl.utils.rng import keyed_uniforms

EndReason = Literal["stop", "decided", "length", "fork"] | Early
"""The reason a segment ended."""


@dataclass(frozen=True)
class TreeRequest:
    """The completions of one prompt: roots that are drawn independently and may fork."""

    prompt: int
    """Index of the prompt."""
    address: tuple[int | str, ...]
    """Key of its random numbers: (seed, step, example id)."""
    roots: int
    leaves: int
    """Maximum number of completions, forks included; equals `roots` when nothing forks."""
    max_tokens: int
    """Maximum length of a completion."""
    first_root: int = 0
    """Number of its first root; roots of earlier rounds are numbered before it."""
    expected_tokens: float | None = None
    """Expected length of a completion; None if nothing is known about this prompt."""
    before: tuple[int, ...] = ()
    """Tokens at the end of the prompt that belong to the completion, for rules that end it."""
    example: Example | None = None
    """The problem that is solved, for rules that end a completion by what it says."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A sequence of tokens as drawn: one node of a tree. Arrays are (n,)."""

    tree: int
    """Index of its request."""
    parent: int
    """Index of the segment it continues, -1 for a root. Parents come first."""
    siblings: int
    """Number of segments created by the same fork; 1 for a root."""
    token_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    end: EndReason

    def up_to(self, count: int) -> Segment:
        """Return it as if a stop text had ended it after so many tokens."""
        kept = (array[:count] for array in (self.token_ids, self.logprobs, self.entropies))
        return Segment(self.tree, self.parent, self.siblings, *kept, end="closed")

    def node(self, parent: int, version: int, round: int = 0) -> Node:
        """Its record in a group, as a child of the node with index `parent` there."""
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
    """Build the leaf of a completion with these tokens; its text excludes the end token."""
    return Leaf(node, reason, tokenizer.decode(ids[:-1] if reason == "stop" else ids))


@dataclass(eq=False)
class Rows:
    """The rows being decoded: the segment each one writes, and the state of the engine."""

    state: DecodeState
    segments: np.ndarray  # (B,) index of the segment being written
    lengths: np.ndarray  # (B,) tokens on the path so far
    alive: np.ndarray  # (B,) bool; a finished row may stay in the batch for a while
    recent_tokens: RecentTokens | None = None  # None: no rule needs it

    def __len__(self) -> int:
        return len(self.segments)

    def take(self, keep: np.ndarray) -> None:
        """Keep these rows only; an index that repeats forks its row."""
        self.state.select(keep)
        self.segments, self.lengths = self.segments[keep], self.lengths[keep]
        self.alive = self.alive[keep]
        if self.recent_tokens is not None:
            self.recent_tokens.take(keep)

    def extend(self, other: Rows) -> None:
        """Add the rows of another batch."""
        self.state.extend(other.state)
        self.segments = np.concatenate([self.segments, other.segments])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.alive = np.concatenate([self.alive, other.alive])
        if self.recent_tokens is not None and other.recent_tokens is not None:
            self.recent_tokens.extend(other.recent_tokens)


@dataclass(eq=False)
class _OpenSegment:
    """A segment that is still being written."""

    tree: int
    parent: int
    siblings: int
    address: tuple[int | str, ...]
    """Key of its random numbers; the last part is its name within the tree."""
    start: int
    """Number of tokens on the path before it."""
    room: int
    """Number of tokens that may still be added to the path."""
    forks: int
    """Number of forks on the path to it."""
    end: EndReason = "fork"

    @cached_property
    def uniforms(self) -> np.ndarray:
        """Uniform numbers (room,) in (0, 1), one for each token."""
        return keyed_uniforms(self.room, *self.address)

    @cached_property
    def coins(self) -> np.ndarray:
        """Uniform numbers (room,) of a second stream."""
        return keyed_uniforms(self.room, *self.address, "coins")


@dataclass(eq=False)
class DecodeLog:
    """All segments started so far, and all tokens in the order they were drawn."""

    requests: Sequence[TreeRequest]
    open: list[_OpenSegment] = field(default_factory=list)
    leaves: np.ndarray = field(init=False)
    """Leaves started, finished ones included, (trees,)."""
    finished: np.ndarray = field(init=False)
    """Leaves finished, (trees,)."""
    tokens: int = 0
    """Tokens drawn."""
    _drawn: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leaves = np.zeros(len(self.requests), np.int64)
        self.finished = np.zeros(len(self.requests), np.int64)

    def work(self) -> Work:
        """Describe what has been sampled so far."""
        most = sum(request.leaves for request in self.requests)
        return Work("sampling", int(self.finished.sum()), most, self.tokens)

    def committed(self) -> int:
        """Most rows the started trees may still need at once, future forks included."""
        most = [request.leaves for request in self.requests]
        may_fork = np.array([request.leaves > request.roots for request in self.requests])
        growing = self.leaves > self.finished
        limit = np.where(may_fork & growing, most, self.leaves)
        return int((limit - self.finished).sum())

    def request(self, segment: int) -> TreeRequest:
        """The request that a segment belongs to."""
        return self.requests[self.open[segment].tree]

    def begin_root(self, tree: int, number: int) -> int:
        """Start one root of a tree and return its segment."""
        return self._begin(tree, -1, 1, str(self.requests[tree].first_root + number), 0, 0)

    def fork(self, parent: int, length: int, children: int) -> list[int]:
        """End a segment whose path has this length, and start its children."""
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
        """Uniform numbers (B,) for each row's next token; arbitrary for finished rows."""
        segments = [self.open[s] for s in rows.segments]
        places = zip(segments, rows.lengths, strict=True)
        return np.array([s.uniforms[min(n - s.start, s.room - 1)] for s, n in places])

    def coins(self, rows: Rows) -> np.ndarray:
        """Uniform numbers (B,) for fork rules, from a stream separate from the tokens'."""
        segments = [self.open[s] for s in rows.segments]
        places = zip(segments, rows.lengths, strict=True)
        return np.array([s.coins[min(n - s.start, s.room - 1)] for s, n in places])

    def trees(self, rows: Rows) -> np.ndarray:
        """Tree index of each row, (B,)."""
        return np.array([self.open[s].tree for s in rows.segments])

    def write(
        self, rows: Rows, tokens: np.ndarray, logprobs: np.ndarray, entropies: np.ndarray
    ) -> None:
        """Record the tokens drawn for live rows; their paths grow by one token.

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
        self.tokens += int(alive.sum())

    def finish(self, rows: Rows, ended: Mapping[EndReason, np.ndarray]) -> None:
        """End the segments of live rows that have a reason to end or have reached their limit.

        `ended` holds (B,) bool for each reason; the first that applies counts, length is last.
        """
        done = rows.alive & (np.any([*ended.values()], axis=0) | (self.tokens_left(rows) <= 0))
        for row in np.flatnonzero(done):
            segment = self.open[rows.segments[row]]
            segment.end = next((reason for reason, hit in ended.items() if hit[row]), "length")
            self.finished[segment.tree] += 1
        rows.alive &= ~done

    def tokens_left(self, rows: Rows) -> np.ndarray:
        """Tokens that may still be added to each path, (B,)."""
        return np.array([self.request(s).max_tokens for s in rows.segments]) - rows.lengths

    def close(self) -> list[Segment]:
        """Return all segments with their tokens."""
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
