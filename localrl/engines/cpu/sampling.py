"""Tokens drawn from logits, and the log-probabilities of given ones, in C or NumPy.

A real vocabulary has tens of thousands of tokens: in NumPy a dozen passes over the logits of a few
rows take as long as the model itself.
"""

from __future__ import annotations

import numpy as np

from localrl.engines.cpu.kernel_choice import steps

LEAST = np.float32(-1e4)
"""As good as -inf to the exponential, but 0 times -inf would be no number in the entropy."""

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens, their log-probabilities, and the entropy of the whole distribution, (B,) each."""


def draw(logits: np.ndarray, uniforms: np.ndarray | None, temperature: float) -> Drawn:
    """One token per row by inverting the cumulative distribution, or the likeliest.

    logits (B, V), uniforms (B,) in (0, 1); None at temperature 0, where the log-probabilities and
    entropies are those of temperature 1. One exponential serves all that is returned.
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
        # The first entry above the mark: a token of weight 0 is never it.
        mark = (np.asarray(uniforms, np.float32) * cumulative[:, -1])[:, None]
        tokens = np.argmax(cumulative > mark, axis=-1)
    logprobs = np.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - np.log(total)
    return tokens, logprobs, _entropy(shifted, weights, total)


def entropy(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Entropy (B,) in nats of each row's next-token distribution; at temperature 0 as at 1."""
    return _entropy(*_weigh(logits, temperature or 1.0))


def target_logprobs(logits: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities (n,) of the targets; the logits (n, V) become all probabilities."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits /= np.float32(temperature)
    chosen = logits[np.arange(len(logits)), targets]
    np.exp(logits, out=logits)
    # In float32 the small ones of a large vocabulary would be lost.
    total = logits.sum(axis=-1, dtype=np.float64).astype(np.float32)
    logits /= total[:, None]
    return chosen - np.log(total)


@np.errstate(invalid="ignore")  # the ledger refuses what is not finite
def _weigh(logits: np.ndarray, temperature: float) -> Drawn:
    """Logits below their maximum (B, V), their exponentials, and the sum of these (B,)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted /= np.float32(temperature)
    np.maximum(shifted, LEAST, out=shifted)
    weights = np.exp(shifted)
    return shifted, weights, weights.sum(axis=-1)


def _entropy(shifted: np.ndarray, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.log(total) - (weights * shifted).sum(axis=-1) / total
