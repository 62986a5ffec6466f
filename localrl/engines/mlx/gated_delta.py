"""The gated delta rule over chunks of tokens, differentiable, with memory linear in tokens.

    S_t = g_t S_{t-1} + u_t k_t^T,   u_t = beta_t (v_t - g_t S_{t-1} k_t),   y_t = S_t q_t

mlx-lm computes it token by token when gradients are wanted, and keeps several states of (Dv, Dk)
numbers per head for each token. Here one state per chunk of C tokens is kept. Within a chunk that
begins with the state S, with G_t the product of its decays up to t,

    U = T diag(beta) (V - diag(G) K S^T),   T = (I + A)^-1,   A_ti = beta_t G_t / G_i k_t k_i, i < t
    Y = diag(G) Q S^T + M U,                                  M_ti = G_t / G_i q_t k_i,       i <= t
    S' = G_C S + sum_i G_C / G_i u_i k_i^T

are products of matrices. Paper: Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464). Here the
inverse is made of blocks that double in size, and everything within chunks is computed again in the
backward pass.
"""

from __future__ import annotations

from typing import Any

from localrl.backend import mx

CHUNK = 32
"""Tokens per chunk, a power of two. A chunk keeps C x C numbers per head where a token would keep
Dv x Dk."""


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Compute the rule for T tokens; return y (B, T, Hv, Dv) in float32, and the last state.

    q, k (B, T, Hk, Dk), where each head serves Hv / Hk heads of v (B, T, Hv, Dv); log_g, beta
    (B, T, Hv), log_g <= 0 being the logarithm of the decay; state (B, Hv, Dv, Dk) float32. A token
    whose log_g and beta are 0 leaves the state as it is.
    """
    tokens, heads = q.shape[1], v.shape[2]
    parts = [_chunks(array.astype(mx.float32), heads) for array in (q, k, v, log_g, beta)]
    ys = []
    for n in range(parts[0].shape[2]):
        y, state = _chunk(*(array[:, :, n] for array in parts), state)
        ys.append(y)
    y = mx.concatenate(ys, axis=2)[:, :, :tokens]
    return y.swapaxes(1, 2), state


def _chunks(array: mx.array, heads: int) -> mx.array:
    """Arrange (B, T, H, ...) as (B, heads, chunks, C, ...), padded with zeros."""
    size = min(CHUNK, 1 << (array.shape[1] - 1).bit_length())
    if array.shape[2] < heads:
        array = mx.repeat(array, heads // array.shape[2], axis=2)
    padding = -array.shape[1] % size
    widths = [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)]
    array = mx.pad(array, widths) if padding else array
    array = array.reshape(array.shape[0], -1, size, *array.shape[2:])
    return mx.moveaxis(array, 3, 1)


def _compute(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute one chunk: q, k (B, H, C, Dk), v (B, H, C, Dv), log_g, beta (B, H, C)."""
    total = mx.cumsum(log_g, axis=-1)
    order = mx.arange(q.shape[2])
    past = order[:, None] >= order
    # Masked before the exponential: of later tokens it might overflow, and its gradient be NaN.
    decay = mx.exp(mx.where(past, total[..., None] - total[..., None, :], -mx.inf))
    earlier = mx.where(order[:, None] > order, decay, 0.0)
    beta, growth = beta[..., None], mx.exp(total)[..., None]
    keys = k.swapaxes(-1, -2)
    inverse = _inverse((beta * earlier) * (k @ keys))
    u = inverse @ (beta * (v - growth * (k @ state.swapaxes(-1, -2))))
    y = growth * (q @ state.swapaxes(-1, -2)) + (decay * (q @ keys)) @ u
    last = mx.exp(total[..., -1:] - total)[..., None]
    return y, growth[..., -1:, :] * state + (last * u).swapaxes(-1, -2) @ k


_chunk: Any = mx.checkpoint(_compute)


@mx.custom_function
def _inverse(lower: mx.array) -> mx.array:
    """Invert I + A for strictly lower triangular A (..., C, C), C a power of two.

    Two inverted blocks of size s on the diagonal, R and S, and the block B below R give one of size
    2 s: its lower left part is -S B R.
    """
    size = lower.shape[-1]
    blocks = mx.ones((*lower.shape[:-2], size, 1, 1))
    s = 1
    while s < size:
        below = _below_diagonal(lower, s)
        first, second = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
        corner = -(second @ below @ first)
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        blocks = mx.concatenate([top, mx.concatenate([corner, second], axis=-1)], axis=-2)
        s *= 2
    return blocks[..., 0, :, :]


@_inverse.vjp
def _inverse_vjp(lower: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    back = inverse.swapaxes(-1, -2)
    return -mx.tril(back @ cotangent @ back, k=-1)


def _below_diagonal(matrix: mx.array, s: int) -> mx.array:
    """Take the blocks (..., C / 2s, s, s) at rows s to 2 s and columns 0 to s of each 2 s."""
    pairs = matrix.shape[-1] // (2 * s)
    tiles = matrix.reshape(*matrix.shape[:-2], pairs, 2 * s, pairs, 2 * s)
    own = mx.arange(pairs)
    tiles = mx.moveaxis(tiles, -2, -3)[..., own, own, :, :]
    return tiles[..., s:, :s]
