"""Mamba 2's recurrence over chunks of tokens, differentiable, with memory linear in tokens.

    S_t = a_t S_{t-1} + d_t x_t b_t^T,   y_t = S_t c_t,   a_t = exp(d_t A)

mlx-lm computes pieces of 256 tokens like attention. Its gradient keeps their scores and, where a
piece goes on from a state, (P, N) numbers per head for each token. Here one state per chunk of C
tokens is kept. Within a chunk that begins with the state S, with L_ti the product of the decays
after i up to t and L_t0 that of all up to t,

    Y = (L * C B^T) diag(d) X + diag(L_t0) C S^T,   S' = L_C0 S + sum_i L_Ci d_i x_i b_i^T

are products of matrices, computed again in the backward pass. Paper: Dao and Gu 2024, Transformers
are SSMs (arXiv 2405.21060).
"""

from __future__ import annotations

from localrl.backend import mx, nn
from localrl.engines.mlx.chunks import decays, over_chunks

CHUNK = 64
"""Most tokens per chunk. A chunk keeps a state of P x N numbers per head."""


def ssm_update(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute mlx-lm's function of this name; tokens outside the mask leave the state as it is.

    Single tokens that are decoded remain mlx-lm's.
    """
    from mlx_lm.models import ssm

    rows, tokens, heads, size = hidden_states.shape
    # A level of a forest has a mask. A token that is decoded has none, and on Metal a kernel.
    if tokens == 1 and mask is None and lengths is None:
        return ssm.ssm_update(hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit)
    if mask is None and lengths is not None:
        mask = mx.arange(tokens) < lengths[:, None]
    dt = mx.clip(nn.softplus(dt.astype(mx.float32) + dt_bias), *time_step_limit)
    if mask is not None:
        dt = mx.where(mask[..., None], dt, 0.0)
    if state is None:
        state = mx.zeros((rows, heads, size, B.shape[-1]))
    log_a = dt * -mx.exp(A_log.astype(mx.float32))
    y, state = state_space(hidden_states, dt, log_a, B, C, state)
    return y.astype(hidden_states.dtype) + hidden_states * D[:, None], state


def state_space(
    x: mx.array, dt: mx.array, log_a: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute the recurrence for T tokens; return y (B, T, H, P) in float32, and the last state.

    x (B, T, H, P); dt, log_a (B, T, H), log_a <= 0 being the logarithm of the decay; b, c
    (B, T, G, N), of which each group serves H / G heads; state (B, H, P, N) float32. A token whose
    dt and log_a are 0 leaves the state as it is.
    """
    tokens = x.shape[1]
    size = -(-tokens // -(-tokens // CHUNK))  # chunks of one size, with the least padding
    return over_chunks(_compute, size, [x, dt, log_a, b, c], state)


def _compute(
    x: mx.array, dt: mx.array, log_a: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute one chunk (B, C, ...) of tokens."""
    (rows, tokens, _, size), groups = x.shape, b.shape[2]
    dt, log_a, x, b, c = (
        array.astype(mx.float32).swapaxes(1, 2) for array in (dt, log_a, x, b, c)
    )  # (B, heads, C, ...)
    decay = decays(log_a)
    scores = (c @ b.swapaxes(-1, -2))[:, :, None]  # (B, G, 1, C, C)
    weights = (scores * decay.reshape(rows, groups, -1, tokens, tokens)).reshape(decay.shape)
    x = x * dt[..., None]
    # The heads of a group read and write their states side by side.
    grouped = (rows, groups, -1, state.shape[-1])
    before = c @ state.reshape(grouped).swapaxes(-1, -2)  # (B, G, C, H / G * P)
    before = before.reshape(rows, groups, tokens, -1, size).swapaxes(2, 3)
    growth = mx.exp(mx.cumsum(log_a, axis=-1))[..., None]
    y = weights @ x + growth * before.reshape(x.shape)
    last = x * decay[:, :, -1, :, None]
    last = last.swapaxes(-1, -2).reshape(rows, groups, -1, tokens)
    state = growth[:, :, -1:] * state + (last @ b).reshape(state.shape)
    return y.swapaxes(1, 2), state
