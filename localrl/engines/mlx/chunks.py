"""Recurrences over chunks of tokens: the backward pass keeps one state per chunk, and no more.

Everything within a chunk is computed again from the chunk's inputs and the state it begins with, so
memory is linear in tokens: Chen et al. 2016 (arXiv 1604.06174), for a recurrence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from localrl.backend import mx

Chunk = Callable[..., tuple[mx.array, mx.array]]
"""Maps arrays (B, C, ...) of a chunk, and its first state, to y (B, C, ...) and the next state."""


def over_chunks(
    compute: Chunk, size: int, given: Sequence[mx.array], state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute T tokens, a chunk of `size` at a time; return y (B, T, ...) and the last state.

    given: arrays (B, T, ...), padded with zeros at the end, which must leave the state as it is.
    """
    tokens = given[0].shape[1]
    if padding := -tokens % size:
        given = [
            mx.pad(array, [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)]) for array in given
        ]
    y, state, _ = _with_gradient(compute, size)(*given, state)
    return y[:, :tokens], state


@functools.cache
def _with_gradient(compute: Chunk, size: int) -> Any:
    """Make the function of all chunks, which also returns their first states for its gradient."""

    def forward(*given: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        state, ys, states = given[-1], [], []
        for inputs in _split(given[:-1], size):
            states.append(state)
            y, state = compute(*inputs, state)
            ys.append(y)
        return mx.concatenate(ys, axis=1), state, mx.stack(states)

    def gradient(given: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        chunks, states = _split(given[:-1], size), outputs[2]
        back, found = cotangents[1], []
        for n, (dy,) in reversed(list(enumerate(_split(cotangents[:1], size)))):
            # Nothing is computed again before the gradient from behind is there.
            inputs = mx.depends([*chunks[n], states[n]], [back])
            *grads, back = mx.vjp(compute, inputs, [dy, back])[1]
            found.append(grads)
        whole = [mx.concatenate(list(parts[::-1]), axis=1) for parts in zip(*found, strict=True)]
        return [*whole, back]

    function: Any = mx.custom_function(forward)
    function.vjp(gradient)
    return function


def _split(arrays: Sequence[mx.array], size: int) -> list[tuple[mx.array, ...]]:
    """Split arrays (B, T, ...) into chunks of tokens."""
    parts = (mx.split(array, array.shape[1] // size, axis=1) for array in arrays)
    return list(zip(*parts, strict=True))


def decays(log_a: mx.array) -> mx.array:
    """Products (..., C, C) of the decays after each earlier token up to each token.

    log_a (..., C): logarithms, at most 0. They are summed for each pair of tokens, since
    differences of sums from the start lose digits, and never above 0, where they might overflow.
    """
    order = mx.arange(log_a.shape[-1])
    # The token of a row is later than that of a column.
    summed = mx.cumsum(mx.where(order[:, None] > order, log_a[..., None], 0.0), axis=-2)
    return mx.where(order[:, None] >= order, mx.exp(summed), 0.0)
