"""Batched decoding: many completions of many prompts, one forward call per token.

Each prompt is prefilled once and its cache is forked for its completions. A running row is forked
the same way, by gathering its cache. Finished rows leave the batch and waiting ones take their
places; there are never more than `rows`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np

from localrl.errors import ConfigError
from localrl.policy.engine import Prefilled
from localrl.policy.model import Policy
from localrl.records import Work
from localrl.rollouts.batch import DecodeLog, EndReason, Rows, Segment, TreeRequest
from localrl.rollouts.decided import Decisions
from localrl.rollouts.pace import Pace
from localrl.rollouts.stops import Stops

CHILDREN = 2
"""Number of rows that one row becomes at a fork."""
SHARED_POSITIONS = 1024
"""Extra positions that copies of the prompts must take before prompts are stored once. Below this,
the additional operations of a step take longer than reading the copies."""


@dataclass
class DecodeCounts:
    """The cost of decoding so far."""

    forward_calls: int = 0
    prefill_positions: int = 0
    decode_positions: int = 0


@dataclass(frozen=True, eq=False)
class LiveView:
    """The information a fork rule may use: only past tokens. Arrays are (B,)."""

    trees: np.ndarray
    """Index of the row's tree."""
    entropies: np.ndarray
    """Entropy of the row's next-token distribution, in nats."""
    lengths: np.ndarray
    """Number of tokens on the path so far."""
    since_fork: np.ndarray
    """Number of tokens since the last fork on the path, or since its start."""
    forks: np.ndarray
    """Number of forks on the path so far."""
    leaves_left: np.ndarray
    """Number of leaves that the row's tree may still add."""
    coins: np.ndarray
    """Uniform number in (0, 1) for each row, for randomised rules."""
    alive: np.ndarray
    """False for a finished row."""
    expected: np.ndarray
    """Expected length of completions of the row's prompt, in tokens; NaN if unknown."""


class ForkRule(Protocol):
    """Decides where paths fork, from a `LiveView` alone: before the next token is drawn."""

    def choose(self, view: LiveView) -> np.ndarray:
        """Return the rows that fork now, (B,) bool; at most `leaves_left` for each tree."""
        ...


@dataclass(eq=False)
class Decoder:
    """Decodes with one policy; its counts accumulate over calls."""

    policy: Policy
    temperature: float
    """Sampling temperature; 0 always takes the most likely token, see `DecodeState.sample`."""
    rows: int
    """Maximum number of sequences decoded at once."""
    counts: DecodeCounts = field(default_factory=DecodeCounts)
    stops: Stops | None = None
    """Rules that end completions early."""
    decisions: Decisions | None = None
    """Ends completions whose outcome is decided."""
    beat: Callable[[Work], None] = lambda work: None
    """Called with every forward pass; it may raise to end the decoding."""
    pace: Pace = field(default_factory=Pace)
    prefill_rows: int = 0
    """Maximum number of prompts prefilled at once; 0: as many as there are free rows."""

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[TreeRequest],
        rule: ForkRule | None = None,
    ) -> list[Segment]:
        """Complete every request and return the segments in the order they were started.

        Samples from the whole distribution unless the temperature is 0.

        Raises: ConfigError if a tree may have more leaves than there are rows; LocalRLError if the
        model's logits are not finite.
        """
        self._check(requests)
        log = DecodeLog(requests)
        waiting = _Waiting(self, prompts, log)
        ends = np.array(sorted(self.policy.tokenizer.end_ids))
        live: Rows | None = None
        while waiting or live is not None:
            self.beat(log.work())
            live = self._refill(live, waiting)
            started, rows = perf_counter(), len(live)
            if rule is not None:
                self._fork(live, log, rule)
            ahead = rule is None and self._looks_ahead(live, log)
            tokens = self._draw(live, log, ahead)
            ended: dict[EndReason, np.ndarray] = {"stop": np.isin(tokens, ends)}
            if self.decisions is not None:
                ended["decided"] = self.decisions.ended(live, log, tokens, ~ended["stop"])
            if self.stops is not None and live.recent_tokens is not None:
                ended |= self.stops.ended(live.recent_tokens, tokens, live.alive)
            log.finish(live, ended)
            live = self._forward(live, tokens, fed=ahead)
            self.pace.stepped(rows, perf_counter() - started)
        return log.close()

    def _check(self, requests: Sequence[TreeRequest]) -> None:
        most = max((r.leaves for r in requests if r.leaves > r.roots), default=0)
        if most > self.rows:
            raise ConfigError(
                f"A tree may have {most} leaves, but only {self.rows} rows are decoded at once. "
                "Raise memory.decode_rows or lower rollout.group_size."
            )

    def _refill(self, live: Rows | None, waiting: _Waiting) -> Rows:
        """Start waiting roots if there are free rows."""
        while fresh := waiting.admit(self.rows):
            if live is None:
                live = fresh
                continue
            if len(live) + len(fresh) > self.rows:
                live.take(np.flatnonzero(live.alive))
            live.extend(fresh)
        assert live is not None
        return live

    def _fork(self, live: Rows, log: DecodeLog, rule: ForkRule) -> None:
        """Fork the rows chosen by the rule in two; finished rows are dropped at the same time."""
        entropies = live.state.entropies(self.temperature)
        chosen = rule.choose(_view(live, log, entropies)) & live.alive
        if not chosen.any():
            return
        keep = np.flatnonzero(live.alive)
        index = np.repeat(keep, np.where(chosen[keep], CHILDREN, 1))
        segments: list[int] = []
        for row in keep:
            parent = int(live.segments[row])
            forks = chosen[row]
            length = int(live.lengths[row])
            segments += log.fork(parent, length, CHILDREN) if forks else [parent]
        live.take(index)
        live.segments = np.array(segments)

    def _looks_ahead(self, live: Rows, log: DecodeLog) -> bool:
        """Return True if the next step is worth queueing before this one's tokens are known.

        It is not for the engine, or when all rows are about to reach their limits.
        """
        return self.policy.engine.looks_ahead and bool(
            (log.tokens_left(live) > 1)[live.alive].any()
        )

    def _draw(self, live: Rows, log: DecodeLog, ahead: bool) -> np.ndarray:
        """Draw the next token of every row, and record those of live rows."""
        uniforms = log.uniforms(live) if self.temperature else None
        drawn = live.state.sample(uniforms, self.temperature, ahead=ahead)
        if ahead:
            self._count_step(live)
        log.write(live, *drawn)
        return drawn.tokens

    def _forward(self, live: Rows, tokens: np.ndarray, *, fed: bool) -> Rows | None:
        """Feed the tokens just drawn, giving the next logits; None if no row is left.

        fed: they have been fed already. Finished rows are removed once they are an eighth of the
        batch. Gathering the cache costs as much as decoding several rows for a step, so a few
        finished rows stay in a large batch.
        """
        finished = len(live) - int(live.alive.sum())
        if finished == len(live):
            return None
        if finished and finished * 8 >= len(live):
            keep = np.flatnonzero(live.alive)
            live.take(keep)
            tokens = tokens[keep]
        if not fed:
            live.state.step(tokens)
            self._count_step(live)
        return live

    def _count_step(self, live: Rows) -> None:
        self.counts.forward_calls += 1
        self.counts.decode_positions += len(live)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        """Run one forward pass over all prompts."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
        prefilled = self.policy.engine.prefill(tokens, lengths)
        self.counts.forward_calls += 1
        self.counts.prefill_positions += sum(lengths)
        return prefilled


class _Waiting:
    """Roots not yet started, and the prefilled prompts that some of them still need."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], log: DecodeLog) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._log = log
        engine = decoder.policy.engine
        self._shares = engine.shares_prompts and sharing_pays_off(
            [len(prompts[r.prompt]) * (r.leaves - 1) for r in log.requests],
            decoder.rows / max(sum(r.leaves for r in log.requests), 1),
            max(SHARED_POSITIONS, engine.copied_positions),
        )
        self._queue = deque(
            (tree, n) for tree, request in enumerate(log.requests) for n in range(request.roots)
        )
        self._places: dict[int, int] = {}  # prompt -> index in the latest prefill
        self._read = 0  # prompts prefilled
        self._prefilled: Prefilled | None = None

    def __bool__(self) -> bool:
        return bool(self._queue)

    def admit(self, rows: int) -> Rows | None:
        """Start the roots that fit next to the running ones; each prompt is prefilled only once.

        One call uses one prefill; returns None if nothing fits or nothing is waiting.
        """
        if not self._queue or not self._fits(rows):
            return None
        if self._prefilled is None or self._prompt(0) not in self._places:
            self._prefilled = self._prefill(rows - self._log.committed())
        segments: list[int] = []
        sources: list[int] = []
        while self._queue and self._prompt(0) in self._places and self._fits(rows):
            sources.append(self._places[self._prompt(0)])
            segments.append(self._log.begin_root(*self._queue.popleft()))
        shared = list(self._places) if self._shares else None
        state = self._prefilled.fork(np.array(sources), shared)
        if not self._queue:  # no remaining root continues from them
            self._prefilled = None
        count = len(segments)
        stops = self._decoder.stops
        before = [self._log.request(segment).before for segment in segments]
        return Rows(
            state,
            np.array(segments),
            np.zeros(count, int),
            np.ones(count, bool),
            None if stops is None else stops.begin(before),
        )

    def _fits(self, rows: int) -> bool:
        """Return True if the next root fits, and its tree's forks too if it is the first root."""
        tree, _ = self._queue[0]
        request = self._log.requests[tree]
        forks = request.leaves > request.roots
        begun = self._log.leaves[tree] > 0
        more = (0 if begun else request.leaves) if forks else 1
        return self._log.committed() + more <= rows

    def _prompt(self, place: int) -> int:
        return self._log.requests[self._queue[place][0]].prompt

    def _prefill(self, free: int) -> Prefilled:
        """Prefill the prompts of the waiting roots, up to the free rows and `prefill_rows`."""
        count = min(max(free, 1), len(self._queue))
        wanted = list(dict.fromkeys(self._prompt(i) for i in range(count)))
        wanted = wanted[: self._decoder.prefill_rows or None]
        self._places = {prompt: place for place, prompt in enumerate(wanted)}
        reading = Work("reading prompts", self._read, len(self._prompts))
        self._decoder.beat(self._log.work() if self._log.tokens else reading)
        self._read += len(wanted)
        started = perf_counter()
        prefilled = self._decoder.prefill([self._prompts[p] for p in wanted])
        self._decoder.pace.read(len(wanted), perf_counter() - started)
        return prefilled


def sharing_pays_off(copies: Sequence[int], share: float, least: int) -> bool:
    """Return True if storing each prompt once saves more time than it costs.

    copies: positions taken by the extra copies of each request's prompt; share: fraction of all
    rows that is decoded at once, above 1 if there is more room; least: positions that pay off.
    """
    return sum(copies) * min(share, 1) >= least


def _view(live: Rows, log: DecodeLog, entropies: np.ndarray) -> LiveView:
    trees = log.trees(live)
    most = np.array([request.leaves for request in log.requests])
    segments = [log.open[s] for s in live.segments]
    return LiveView(
        trees=trees,
        entropies=entropies,
        lengths=live.lengths,
        since_fork=live.lengths - np.array([segment.start for segment in segments]),
        forks=np.array([segment.forks for segment in segments]),
        leaves_left=(most - log.leaves)[trees],
        coins=log.coins(live),
        alive=live.alive,
        expected=np.array([r.expected_tokens for r in log.requests], np.float64)[trees],
    )
