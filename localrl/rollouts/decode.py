"""Batched decoding: many completions of many prompts, one forward call per token.

Each prompt is prefilled once and its cache forked to all its completions. Finished rows leave the
batch and waiting ones take their places, so that there are never more than `rows`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.errors import LocalRLError
from localrl.policy.model import Policy


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    prompt: int
    """Index of its prompt. Requests of one prompt stand together."""
    uniforms: np.ndarray
    """(max_tokens,) numbers in (0, 1), one for each token."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """One completion as it was drawn; arrays (T,) as in `records.Node`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    stopped: bool
    """True when it ended with an end token, which is included; false when cut off."""


@dataclass
class DecodeCounts:
    """What decoding has cost so far."""

    forward_calls: int = 0
    prefill_positions: int = 0
    decode_positions: int = 0

    def snapshot(self) -> DecodeCounts:
        """The counts as they stand."""
        return replace(self)

    def since(self, earlier: DecodeCounts) -> dict[str, int]:
        """What has been added since, under the names of the metrics."""
        return {
            f"rollout/{name}": count - getattr(earlier, name) for name, count in vars(self).items()
        }


@dataclass(eq=False)
class _Rows:
    """The rows being decoded: which request each is, its next logits, and the shared cache."""

    cache: list[Any]
    logits: mx.array  # (B, V)
    requests: np.ndarray  # (B,) index of the request
    lengths: np.ndarray  # (B,) tokens drawn so far
    alive: np.ndarray  # (B,) bool

    def take(self, keep: np.ndarray) -> None:
        """Keep these rows only; an index may repeat, which forks the row."""
        index = mx.array(keep)
        for layer in self.cache:
            layer.filter(index)
        self.logits = self.logits[index]
        self.requests, self.lengths = self.requests[keep], self.lengths[keep]
        self.alive = self.alive[keep]

    def extend(self, other: _Rows) -> None:
        for layer, more in zip(self.cache, other.cache, strict=True):
            layer.extend(more)
        self.logits = mx.concatenate([self.logits, other.logits])
        self.requests = np.concatenate([self.requests, other.requests])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.alive = np.concatenate([self.alive, other.alive])


@dataclass(eq=False)
class Decoder:
    """Decodes with one policy; the counts add up over calls."""

    policy: Policy
    temperature: float
    rows: int
    """The most sequences decoded at once."""
    counts: DecodeCounts = field(default_factory=DecodeCounts)

    def decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[Sampled]:
        """Sample every request from the whole distribution, in the order given.

        Raises: LocalRLError when the model's logits are not finite.
        """
        ends = np.array(sorted(self.policy.tokenizer.end_ids))
        limits = np.array([len(request.uniforms) for request in requests])
        drawn = _Drawn.empty(len(requests), int(limits.max(initial=0)))
        waiting = _Waiting(self, prompts, requests)
        live: _Rows | None = None
        while waiting or live is not None:
            live = self._refill(live, waiting)
            tokens = self._draw(live, requests, drawn)
            live.lengths += live.alive
            done = np.isin(tokens, ends) | (live.lengths >= limits[live.requests])
            live.alive &= ~done
            live = self._compact(live, waiting)
            if live is not None:
                self._forward(live, drawn)
        return drawn.results(ends)

    def _refill(self, live: _Rows | None, waiting: _Waiting) -> _Rows:
        """Admit waiting requests to the free places, or go on with what is there."""
        while waiting and (live is None or len(live.alive) < self.rows):
            free = self.rows - (0 if live is None else len(live.alive))
            fresh = waiting.admit(free)
            if live is None:
                live = fresh
            else:
                live.extend(fresh)
        assert live is not None
        return live

    def _draw(self, live: _Rows, requests: Sequence[Request], drawn: _Drawn) -> np.ndarray:
        """Draw the next token of every row and write down those of living rows."""
        places = np.minimum(live.lengths, [len(requests[i].uniforms) - 1 for i in live.requests])
        uniforms = [requests[i].uniforms[t] for i, t in zip(live.requests, places, strict=True)]
        tokens, logprobs, entropies = draw(
            live.logits, mx.array(np.array(uniforms, np.float32)), self.temperature
        )
        mx.eval(tokens, logprobs, entropies)
        return drawn.write(live, np.array(tokens), np.array(logprobs), np.array(entropies))

    def _compact(self, live: _Rows, waiting: _Waiting) -> _Rows | None:
        """Let finished rows leave, once they are an eighth of the batch.

        Gathering the cache costs as much as several rows' share of a step, so the last few finished
        rows of a large batch ride along; their tokens are not written down.
        """
        finished = len(live.alive) - int(live.alive.sum())
        if finished == len(live.alive):
            return None
        if finished and finished * 8 >= len(live.alive):
            live.take(np.flatnonzero(live.alive))
        return live

    def _forward(self, live: _Rows, drawn: _Drawn) -> None:
        """Feed the tokens just drawn; leaves the next logits in `live`."""
        last = np.maximum(live.lengths - 1, 0)
        tokens = mx.array(drawn.token_ids[live.requests, last][:, None])  # (B, 1)
        live.logits = self.policy.model(tokens, cache=live.cache)[:, -1]
        self.counts.forward_calls += 1
        self.counts.decode_positions += len(live.alive)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], mx.array]:
        """One forward over all prompts: a cache of as many rows, and their next logits (P, V)."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
        cache, logits = self.policy.prefill(mx.array(tokens), lengths)
        mx.eval(logits, [layer.state for layer in cache])
        self.counts.forward_calls += 1
        self.counts.prefill_positions += sum(lengths)
        return cache, logits


class _Waiting:
    """Requests not yet started, and the prefilled prompts that some of them still need."""

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._queue = deque((i, request.prompt) for i, request in enumerate(requests))
        self._prefilled: dict[int, int] = {}  # prompt -> row of the caches below
        self._cache: list[Any] = []
        self._logits = mx.array([])

    def __bool__(self) -> bool:
        return bool(self._queue)

    def admit(self, free: int) -> _Rows:
        """Start up to `free` requests; prefills the prompts they need, each only once."""
        if self._queue[0][1] not in self._prefilled:
            self._prefill(free)
        batch: list[tuple[int, int]] = []
        while self._queue and len(batch) < free and self._queue[0][1] in self._prefilled:
            batch.append(self._queue.popleft())
        forks = mx.array([self._prefilled[prompt] for _, prompt in batch])
        # The copy shares its arrays; gathering rebinds them, and the prefilled ones stay.
        cache = copy.deepcopy(self._cache)
        for layer in cache:
            layer.filter(forks)
        return _Rows(
            cache=cache,
            logits=self._logits[forks],
            requests=np.array([request for request, _ in batch]),
            lengths=np.zeros(len(batch), np.int64),
            alive=np.ones(len(batch), bool),
        )

    def _prefill(self, free: int) -> None:
        wanted: dict[int, None] = {}
        for _, prompt in list(self._queue)[:free]:
            wanted[prompt] = None
        self._prefilled = {prompt: row for row, prompt in enumerate(wanted)}
        self._cache, self._logits = self._decoder.prefill([self._prompts[p] for p in wanted])


@dataclass(eq=False)
class _Drawn:
    """Everything drawn so far, one line per request."""

    token_ids: np.ndarray  # (R, T) int32
    logprobs: np.ndarray  # (R, T) float32
    entropies: np.ndarray  # (R, T) float32
    lengths: np.ndarray  # (R,)

    @classmethod
    def empty(cls, requests: int, tokens: int) -> _Drawn:
        shape = (requests, tokens)
        return cls(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros(requests, np.int64),
        )

    def write(
        self, live: _Rows, tokens: np.ndarray, logprobs: np.ndarray, entropies: np.ndarray
    ) -> np.ndarray:
        """Write down the draws of living rows; returns the tokens."""
        if not np.isfinite(logprobs[live.alive]).all():
            raise LocalRLError(
                "The model's logits are not finite, so nothing can be sampled from them. The "
                "adapter has diverged (lower learning.lr) or the model's weights are damaged."
            )
        place = live.requests[live.alive], live.lengths[live.alive]
        self.token_ids[place] = tokens[live.alive]
        self.logprobs[place] = logprobs[live.alive]
        self.entropies[place] = entropies[live.alive]
        self.lengths[live.requests[live.alive]] += 1
        return tokens

    def results(self, ends: np.ndarray) -> list[Sampled]:
        return [
            Sampled(
                self.token_ids[i, :n],
                self.logprobs[i, :n],
                self.entropies[i, :n],
                bool(np.isin(self.token_ids[i, n - 1], ends)),
            )
            for i, n in enumerate(self.lengths)
        ]


def draw(
    logits: mx.array, uniforms: mx.array, temperature: float
) -> tuple[mx.array, mx.array, mx.array]:
    """One token per row by inverting the cumulative distribution, in float32.

    logits (B, V), uniforms (B,) in (0, 1). Returns tokens, their log-probabilities and the entropy
    of the whole distribution, each (B,). One exponential serves all three.
    """
    logits = logits.astype(mx.float32) / temperature
    # -1e4 is as good as -inf to the exponential, but 0 * -inf would be no number in the entropy.
    shifted = mx.maximum(logits - logits.max(axis=-1, keepdims=True), -1e4)
    weights = mx.exp(shifted)
    cumulative = mx.cumsum(weights, axis=-1)
    total = cumulative[:, -1]
    # The first entry above the mark: a token of weight 0 is never it.
    tokens = mx.argmax(cumulative > (uniforms * total)[:, None], axis=-1)
    log_total = mx.log(weights.sum(axis=-1))
    logprobs = mx.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - log_total
    entropies = log_total - (weights * shifted).sum(axis=-1) / weights.sum(axis=-1)
    return tokens, logprobs, entropies
