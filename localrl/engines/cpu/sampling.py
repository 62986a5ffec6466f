"""Drawing tokens from logits, and log-probabilities of given tokens, in C or NumPy.

A real vocabulary has tens of thousands of tokens: in NumPy the dozen passes over the logits of a
few rows take as long as the model itself.
"""

from __future__ import annotations

import numpy as np

from localrl.engines.cpu.kernel_choice import steps

LEAST = np.float32(-1e4)
"""Lower bound of shifted logits: exp gives 0 as for -inf, but 0 * -inf would be NaN in entropy."""

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens, their log-probabilities, and entropies of the whole distributions, (B,) each."""


def draw(logits: np.ndarray, uniforms: np.ndarray | None, temperature: float) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution, or take the most likely.

    logits (B, V), uniforms (B,) in (0, 1); None at temperature 0, where the log-probabilities and
    entropies are those of temperature 1. All results come from one exponential.
    """
    temperature = temperature or 1.0
    if (c := steps()) is not None:
        rows = len(logits)
        found = np.empty(rows, np.int64), np.empty(rows, np.float32), np.empty(rows, np.float32)
        marks = None if uniforms is None else np.asarray(uniforms, np.float32)
        c.draw(np.ascontiguousarray(logits), marks, *found, temperature)
        return found
    shifted, weights, total = _weigh(logits, temperature)
    if uniforms is None:
        tokens = np.argmax(shifted, axis=-1)
    else:
        cumulative = np.cumsum(weights, axis=-1)
        # The first entry above the mark, which is never a token of weight 0.
        mark = (np.asarray(uniforms, np.float32) * cumulative[:, -1])[:, None]
        tokens = np.argmax(cumulative > mark, axis=-1)
    logprobs = np.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - np.log(total)
    return tokens, logprobs, _entropy(shifted, weights, total)


def entropy(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Entropy (B,) in nats of each row's next-token distribution; at temperature 0 as at 1."""
    return _entropy(*_weigh(logits, temperature or 1.0))


def target_logprobs(logits: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities (n,) of the targets; overwrites logits (n, V) with all probabilities."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits /= np.float32(temperature)
    chosen = logits[np.arange(len(logits)), targets]
    np.exp(logits, out=logits)
    # In float32 the many small terms of a large vocabulary would be lost.
    total = logits.sum(axis=-1, dtype=np.float64).astype(np.float32)
    logits /= total[:, None]
    return chosen - np.log(total)


@np.errstate(invalid="ignore")  # DecodeLog rejects values that are not finite
def _weigh(logits: np.ndarray, temperature: float) -> Drawn:
    """Logits minus their maximum (B, V), their exponentials, and the sums of those (B,)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted /= np.float32(temperature)
    np.maximum(shifted, LEAST, out=shifted)
    weights = np.exp(shifted)
    return shifted, weights, weights.sum(axis=-1)


def _entropy(shifted: np.ndarray, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.log(total) - (weights * shifted).sum(axis=-1) / total
