"""Decoding with mlx-lm's models and caches: one token of every row at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.engines.mlx.network import Network
from localrl.engines.mlx.prefix_cache import fork_prompts
from localrl.policy.engine import Sampled

CACHE_STEP = 64
"""Tokens by which the cache of a batch grows; mlx-lm's 256 would mostly copy empty space here."""


def prefill(network: Network, tokens: np.ndarray, lengths: Sequence[int]) -> MLXPrefilled:
    """Run right-padded prompts (P, L)."""
    cache = _empty_cache(network.model, len(lengths))
    padding = [tokens.shape[1] - length for length in lengths]
    for layer in cache:
        layer.prepare(lengths=list(lengths), right_padding=padding)
    logits = network.last_logits(mx.array(tokens), cache, mx.array(list(lengths)) - 1)
    for layer in cache:
        layer.finalize()
    mx.eval(logits, [layer.state for layer in cache])
    return MLXPrefilled(network, cache, logits)


def _empty_cache(model: Any, rows: int) -> list[Any]:
    """Create mlx-lm's own caches for a batch of this model, one per layer."""
    from mlx_lm.models.cache import make_prompt_cache

    single = make_prompt_cache(model)
    cache = [layer.merge([copy.deepcopy(layer) for _ in range(rows)]) for layer in single]
    for layer in cache:
        if hasattr(layer, "step"):
            layer.step = CACHE_STEP
    return cache


@dataclass(frozen=True, eq=False)
class MLXPrefilled:
    """Caches of prompts, one per layer, and the logits (P, V) after each prompt."""

    network: Network
    cache: list[Any]
    last: mx.array

    def fork(self, rows: np.ndarray, prompts: Sequence[int] | None) -> MLXState:
        """Create a state of rows that continue the prompts: see `Prefilled.fork`."""
        cache = fork_prompts(self.cache, rows, prompts)
        return MLXState(self.network, cache, self.last[mx.array(rows)])

    def logits(self) -> np.ndarray:
        """Float32 logits (P, V)."""
        return np.array(self.last.astype(mx.float32))


@dataclass(eq=False)
class MLXState:
    """Caches of rows, one per layer, and their next logits (B, V): see `DecodeState`."""

    network: Network
    cache: list[Any]
    next: mx.array

    def __len__(self) -> int:
        return len(self.next)

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows; an index that repeats forks its row."""
        keep = mx.array(rows)
        for layer in self.cache:
            layer.filter(keep)
        self.next = self.next[keep]

    def extend(self, other: MLXState) -> None:
        """Add the rows of another state."""
        for layer, more in zip(self.cache, other.cache, strict=True):
            layer.extend(more)
        self.next = mx.concatenate([self.next, other.next])

    def sample(
        self, uniforms: np.ndarray | None, temperature: float, *, ahead: bool = False
    ) -> Sampled:
        """Sample one token per row: see `draw`."""
        drawn = draw(self.next, uniforms, temperature)
        mx.async_eval(drawn)  # together with the pending step
        if ahead:
            # Queued before the tokens are read, so the device computes while Python works.
            self._feed(drawn[0])
            mx.async_eval(self.next)
        return Sampled(*map(np.array, drawn))

    def entropies(self, temperature: float) -> np.ndarray:
        """Entropy (B,) in nats of each row's next-token distribution."""
        return np.array(entropy(self.next, temperature))

    def step(self, tokens: np.ndarray) -> None:
        """Feed one token (B,) to each row; computed when the logits are first used."""
        self._feed(mx.array(tokens))

    def _feed(self, tokens: mx.array) -> None:
        self.next = self.network.last_logits(tokens[:, None], self.cache)

    def wait(self) -> None:
        """Compute the pending step."""
        mx.eval(self.next, [layer.state for layer in self.cache])

    def logits(self) -> np.ndarray:
        """Float32 logits (B, V)."""
        return np.array(self.next.astype(mx.float32))


def draw(
    logits: mx.array, uniforms: np.ndarray | None, temperature: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Draw tokens; return log-probabilities and entropies too, (B,) each: see `DecodeState.sample`.

    logits (B, V), uniforms (B,) in (0, 1). All three come from one exponential.
    """
    shifted, weights, total = _weigh(logits, temperature or 1.0)
    if uniforms is None:
        tokens = mx.argmax(shifted, axis=-1)
    else:
        cumulative = mx.cumsum(weights, axis=-1)
        # The first entry above the mark, which is never a token of weight 0.
        mark = (mx.array(uniforms, dtype=mx.float32) * cumulative[:, -1])[:, None]
        tokens = mx.argmax(cumulative > mark, axis=-1)
    log_total = mx.log(total)
    logprobs = mx.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - log_total
    return tokens, logprobs, log_total - (weights * shifted).sum(axis=-1) / total


def entropy(logits: mx.array, temperature: float) -> mx.array:
    """Entropy (B,) in nats of each row's next-token distribution; at temperature 0 as at 1."""
    shifted, weights, total = _weigh(logits, temperature or 1.0)
    return mx.log(total) - (weights * shifted).sum(axis=-1) / total


def _weigh(logits: mx.array, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """Logits minus their maximum (B, V), their exponentials, and the sums of those (B,)."""
    logits = logits.astype(mx.float32) / temperature
    # exp(-1e4) is 0 as for -inf, but 0 * -inf would be NaN in the entropy.
    shifted = mx.maximum(logits - logits.max(axis=-1, keepdims=True), -1e4)
    weights = mx.exp(shifted)
    return shifted, weights, weights.sum(axis=-1)
