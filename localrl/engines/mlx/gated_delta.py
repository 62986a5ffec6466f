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

from localrl.backend import mx, nn
from localrl.engines.mlx.chunks import decays, over_chunks

CHUNK = 32
"""Tokens per chunk, a power of two. A chunk keeps C x C numbers per head where a token would keep
Dv x Dk."""


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """Compute mlx-lm's function of this name; `use_kernel` is False where a gradient is wanted.

    Single tokens, gates of another shape, and on Metal passes without a gradient, for which mlx-lm
    has a kernel, remain mlx-lm's.
    """
    from mlx_lm.models import gated_delta as stock

    on_gpu = use_kernel and mx.default_device().type == mx.gpu
    if q.shape[1] == 1 or a.ndim != 3 or on_gpu:
        options = {"lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
        return stock.gated_delta_update(
            q, k, v, a, b, A_log, dt_bias, state, mask, use_kernel=use_kernel, **options
        )
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_g = -rate * nn.softplus(a + dt_bias)
    else:
        log_g = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if mask is not None:
        log_g, beta = (mx.where(mask[..., None], array, 0.0) for array in (log_g, beta))
    if state is None:
        state = mx.zeros((q.shape[0], v.shape[2], v.shape[3], q.shape[3]))
    y, state = gated_delta(q, k, v, log_g, beta, state)
    return y.astype(q.dtype), state


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
    size = min(CHUNK, 1 << (q.shape[1] - 1).bit_length())
    return over_chunks(_compute, size, [q, k, v, log_g, beta], state)


def _compute(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute one chunk (B, C, ...) of tokens."""
    repeats = v.shape[2] // q.shape[2]
    q, k = (mx.repeat(array, repeats, axis=2) if repeats > 1 else array for array in (q, k))
    q, k, v, log_g, beta = (
        array.astype(mx.float32).swapaxes(1, 2) for array in (q, k, v, log_g, beta)
    )
    decay, order = decays(log_g), mx.arange(q.shape[2])
    earlier = mx.where(order[:, None] > order, decay, 0.0)
    beta, growth = beta[..., None], mx.exp(mx.cumsum(log_g, axis=-1))[..., None]
    keys = k.swapaxes(-1, -2)
    inverse = _inverse((beta * earlier) * (k @ keys))
    u = inverse @ (beta * (v - growth * (k @ state.swapaxes(-1, -2))))
    y = growth * (q @ state.swapaxes(-1, -2)) + (decay * (q @ keys)) @ u
    last = decay[..., -1, :, None] * u
    state = growth[..., -1:, :] * state + last.swapaxes(-1, -2) @ k
    return y.swapaxes(1, 2), state


def _inverted(lower: mx.array) -> mx.array:
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


_inverse: Any = mx.custom_function(_inverted)


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
