"""Log-probabilities of given tokens under an mlx-lm model, differentiable w.r.t. adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from localrl.backend import mx
from localrl.engines.mlx.forest import forest_states
from localrl.engines.mlx.network import Network
from localrl.policy.forest_packing import Layout
from localrl.policy.packing import MicroBatch

Head = Callable[[mx.array], mx.array]


def token_logprobs(
    network: Network, micro: MicroBatch, *, temperature: float, head_chunk: int
) -> mx.array:
    """Float32 log-probabilities (N,) of a micro-batch's targets: see `Engine.token_logprobs`."""
    sources, targets = mx.array(micro.sources), mx.array(micro.targets)
    if isinstance(micro.tokens, Layout):
        states = forest_states(network, micro.tokens)  # (positions, d)
    elif network.hidden is not None:
        states = network.hidden(mx.array(micro.tokens))  # (B, L, d)
    else:
        logits = network.model(mx.array(micro.tokens))  # (B, L, V)
        flat = logits.reshape(-1, logits.shape[-1])[sources]
        return gather_logprobs(flat, targets, temperature)
    assert network.head is not None
    flat = states.reshape(-1, states.shape[-1])[sources]  # (N, d)
    return head_logprobs(network.head, flat, targets, temperature, head_chunk)


def head_logprobs(
    head: Head, states: mx.array, targets: mx.array, temperature: float, chunk: int
) -> mx.array:
    """Log-probabilities (N,) from states (N, d), computing `chunk` positions' logits at a time.

    The gradient is closed-form, d logp / d logits = (onehot(target) - softmax) / temperature, taken
    through the frozen head chunk by chunk; no chunk's logits are kept for it. Idea: Liger Kernel,
    Hsu et al. 2024 (arXiv 2410.10989), which fuses a cross-entropy into the head.
    """

    def score(states: mx.array) -> mx.array:
        done: list[mx.array] = []
        for part, piece in _one_by_one(states, chunk, done):
            done.append(gather_logprobs(head(piece), targets[part], temperature))
        return mx.concatenate(done)

    def gradient(states: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        done: list[mx.array] = []
        for part, piece in _one_by_one(states, chunk, done):
            logits = head(piece)
            weight = cotangent[part] / temperature
            softmax = mx.softmax(logits.astype(mx.float32) / temperature, axis=-1)
            grad = (-weight[:, None] * softmax).at[mx.arange(len(piece)), targets[part]].add(weight)
            done += mx.vjp(head, [piece], [grad.astype(logits.dtype)])[1]
        return mx.concatenate(done)

    scored: Any = mx.custom_function(score)
    scored.vjp(gradient)
    return scored(states)


def gather_logprobs(logits: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) of `targets` from logits (N, V), in float32."""
    logits = logits.astype(mx.float32) / temperature
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


def _one_by_one(
    states: mx.array, chunk: int, done: list[mx.array]
) -> Iterator[tuple[slice, mx.array]]:
    """Yield pieces of the states, each computed only after the results of the previous one."""
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        yield part, mx.depends([states[part]], done[-1:])[0] if done else states[part]
