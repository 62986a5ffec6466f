"""The objective: arrays in, sums out."""

from __future__ import annotations

from dataclasses import dataclass

from localrl.backend import mx


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums over the tokens of a micro-batch; those of a step add up exactly."""

    loss: mx.array
    clipped_low: mx.array
    clipped_high: mx.array
    gap: mx.array
    """Sum of |new - sampled| log-probability."""
    gap_max: mx.array


def clipped_objective(
    logprobs: mx.array,
    sampled_logprobs: mx.array,
    coefficients: mx.array,
    *,
    clip_low: float,
    clip_high: float,
) -> ObjectiveSums:
    """Clipped token-level policy gradient, summed over tokens; all arrays (N,), nats.

        L = - sum_t min(r_t c_t, clip(r_t, 1 - clip_low, 1 + clip_high) c_t)
        r_t = exp(logprob - sampled logprob)

    c_t = weight * advantage of the token, so GRPO's 1/G is in it; no division by a group's standard
    deviation or by a completion's length. Papers: clipping Schulman et al. 2017 (1707.06347); group
    baseline Shao et al. 2024 (2402.03300); unequal clip Yu et al. 2025 (2503.14476); constant
    denominator Liu et al. 2025 (2503.20783). The anchor of the ratio is the sampler's own record.
    """
    log_ratio = logprobs - sampled_logprobs
    ratio = mx.exp(log_ratio)
    held = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -mx.minimum(ratio * coefficients, held * coefficients).sum()
    gap = mx.abs(log_ratio)
    return ObjectiveSums(
        loss=loss,
        clipped_low=((ratio < 1 - clip_low) & (coefficients < 0)).sum(),
        clipped_high=((ratio > 1 + clip_high) & (coefficients > 0)).sum(),
        gap=gap.sum(),
        gap_max=gap.max(),
    )
