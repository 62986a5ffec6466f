"""Log-probabilities in NumPy, as a function of MLX that is differentiable by the adapters."""

from __future__ import annotations

from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.policy.array_math import quiet
from localrl.policy.array_model import ArrayModel
from localrl.policy.array_pass import Pass
from localrl.policy.array_room import give_back, like, zeros
from localrl.policy.array_weights import Weights
from localrl.policy.forest_packing import Layout, Level
from localrl.policy.packing import MicroBatch


def array_logprobs(
    model: ArrayModel,
    micro: MicroBatch,
    *,
    temperature: float,
    head_chunk: int,
    gradient: bool,
    recompute: bool,
) -> mx.array:
    """Float32 log-probabilities (N,) of a micro-batch's targets: see `scoring.token_logprobs`.

    gradient: keep what the gradient by the adapters needs; with `recompute` only what enters each
    block, and its keys and values.
    """
    one = Pass(model, _levels(micro), keep=gradient, recompute=recompute)
    head = ChunkedHead(one.weights, micro.targets, temperature, head_chunk)
    layers = model.adapters()
    if not gradient or not layers:
        found = mx.array(head.logprobs(one.forward()[:, micro.sources]))
        give_back()
        return found
    states: list[np.ndarray] = []

    def forward(*_: mx.array) -> mx.array:
        whole = one.forward()
        states.append(whole[:, micro.sources])
        return mx.array(head.logprobs(states[0]))

    def backward(_: Any, cotangent: mx.array, __: mx.array) -> tuple[mx.array, ...]:
        slope = zeros((len(states[0]), one.positions))
        # Every position predicts one token.
        slope[:, micro.sources] = head.back(states[0], np.array(cotangent))
        found = tuple(mx.array(array) for pair in one.back(slope) for array in pair)
        give_back()
        return found

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(*(array for layer in layers for array in (layer.lora_a, layer.lora_b)))


class ChunkedHead:
    """The head at some targets (N,), `chunk` of them at a time.

    The gradient is closed-form, d logp / d logits = (onehot(target) - softmax) / temperature; no
    chunk's logits are kept for it.
    """

    def __init__(
        self, weights: Weights, targets: np.ndarray, temperature: float, chunk: int
    ) -> None:
        self._weights, self._targets = weights, targets
        self._temperature = np.float32(temperature)
        starts = range(0, len(targets), chunk)
        self._parts = [slice(start, start + chunk) for start in starts]

    @quiet
    def logprobs(self, states: np.ndarray) -> np.ndarray:
        """Log-probabilities (N,) of the targets from states (d, N)."""
        found: list[np.ndarray] = []
        for part in self._parts:
            weights, chosen = self._softmax(states, part)
            found.append(chosen - np.log(_total(weights)))
            del weights  # before the next ones are made
        return np.concatenate(found)

    @quiet
    def back(self, states: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Slope by the states (d, N), from that by the log-probabilities (N,)."""
        found = like(states)
        for part in self._parts:
            weights, _ = self._softmax(states, part)
            share = slope[part] / self._temperature
            weights *= -share / _total(weights)
            weights[self._targets[part], np.arange(len(share))] += share
            found[:, part] = self._weights.logits_back(states[:, part], weights)
            del weights
        return found

    def _softmax(self, states: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """exp(logit - highest) (V, n), and the targets' logits less the highest."""
        logits = self._weights.logits(states[:, part])
        logits /= self._temperature
        logits -= logits.max(axis=0)
        chosen = logits[self._targets[part], np.arange(logits.shape[1])]
        return np.exp(logits, out=logits), chosen


def _total(weights: np.ndarray) -> np.ndarray:
    """Sums (n,) over the vocabulary; row after row, which float32 would lose the small ones in."""
    return weights.sum(axis=0, dtype=np.float64).astype(np.float32)


def _levels(micro: MicroBatch) -> tuple[Level, ...]:
    """Those of a forest; or rows, which are its first level."""
    if isinstance(micro.tokens, Layout):
        return micro.tokens.levels
    rows, length = micro.tokens.shape
    return (Level(micro.tokens, np.full(rows, length, np.int32), np.zeros(0, np.int32)),)
