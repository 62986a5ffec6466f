"""Log-probabilities in NumPy, as an MLX function that is differentiable w.r.t. the adapters."""

from __future__ import annotations

from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.engines.cpu.buffers import empty_like, release_all, zeros
from localrl.engines.cpu.forward import ForwardPass
from localrl.engines.cpu.math import ignore_overflow, matmul
from localrl.engines.cpu.model import CPUModel
from localrl.engines.cpu.sampling import target_logprobs
from localrl.engines.cpu.weights import Weights
from localrl.policy.forest_packing import Layout, Level
from localrl.policy.packing import MicroBatch


def token_logprobs(
    model: CPUModel,
    micro: MicroBatch,
    *,
    temperature: float,
    head_chunk: int,
    gradient: bool,
    recompute: bool,
) -> mx.array:
    """Float32 log-probabilities (N,) of a micro-batch's targets: see `Engine.token_logprobs`.

    gradient: keep the activations for the adapters' gradient; with `recompute` only each block's
    input, keys and values.
    """
    one = ForwardPass(model, _levels(micro), keep=gradient, recompute=recompute)
    head = ChunkedHead(one.weights, micro.targets, temperature, head_chunk)
    layers = model.adapters()
    if not gradient or not layers:
        found = mx.array(head.logprobs(one.forward()[:, micro.sources]))
        release_all()
        return found
    states: list[np.ndarray] = []

    def forward(*_: mx.array) -> mx.array:
        whole = one.forward()
        states.append(whole[:, micro.sources])
        return mx.array(head.logprobs(states[0], keep=True))

    def backward(_: Any, cotangent: mx.array, __: mx.array) -> tuple[mx.array, ...]:
        grad = zeros((len(states[0]), one.positions))
        # Each source position predicts one token, so nothing has to be added up.
        grad[:, micro.sources] = head.back(states[0], np.array(cotangent))
        found = tuple(mx.array(array) for pair in one.back(grad) for array in pair)
        release_all()
        return found

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(*(array for layer in layers for array in (layer.lora_a, layer.lora_b)))


class ChunkedHead:
    """The head at given targets (N,), computed `chunk` targets at a time.

    The gradient is closed-form: d logp / d state = (w[target] - sum of p w) / temperature, with the
    rows w of the head and their probabilities p. That sum, the expected row, is computed while a
    chunk's probabilities exist, and is all that is kept of them: the backward pass needs no second
    pass over the vocabulary.
    """

    def __init__(
        self, weights: Weights, targets: np.ndarray, temperature: float, chunk: int
    ) -> None:
        self._weights, self._targets = weights, targets
        self._temperature = np.float32(temperature)
        starts = range(0, len(targets), chunk)
        self._parts = [slice(start, start + chunk) for start in starts]
        self._expected: np.ndarray | None = None  # (d, N)

    @ignore_overflow
    def logprobs(self, states: np.ndarray, *, keep: bool = False) -> np.ndarray:
        """Log-probabilities (N,) of the targets from states (d, N). keep: prepare for `back`."""
        found = np.empty(len(self._targets), np.float32)
        if keep:
            self._expected = empty_like(states)
        for part in self._parts:
            logits = self._weights.logits(states[:, part])
            found[part] = target_logprobs(logits, self._targets[part], float(self._temperature))
            if self._expected is not None:
                self._expected[:, part] = matmul(logits, self._weights.head.weight).T
            del logits  # freed before the next chunk is computed
        return found

    @ignore_overflow
    def back(self, states: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """Gradient w.r.t. the states (d, N), given `grad` w.r.t. the log-probabilities (N,)."""
        assert self._expected is not None
        grad_normed = empty_like(states)
        grad_normed[...] = self._weights.head.weight[self._targets].T
        grad_normed -= self._expected
        grad_normed *= grad / self._temperature
        return self._weights.norm.back(states, grad_normed)


def _levels(micro: MicroBatch) -> tuple[Level, ...]:
    """Levels of a forest; plain rows form a single level."""
    if isinstance(micro.tokens, Layout):
        return micro.tokens.levels
    rows, length = micro.tokens.shape
    return (Level(micro.tokens, np.full(rows, length, np.int32), np.zeros(0, np.int32)),)
