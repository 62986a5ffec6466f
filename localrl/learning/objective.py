"""The surrogate losses and the KL terms, as functions from arrays to sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localrl.backend import mx
from localrl.learning.objectives import Objective


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums over the tokens of a micro-batch; those of a step add up exactly."""

    loss: mx.array
    clipped_low: mx.array
    clipped_high: mx.array
    gap: mx.array
    """Sum of |new - anchor| log-probability."""
    gap_max: mx.array
    kl: mx.array
    """Sum of KL values times their weights."""


def policy_sums(
    objective: Objective,
    logprobs: mx.array,
    anchor_logprobs: mx.array,
    coefficients: mx.array,
    rows: np.ndarray,
) -> ObjectiveSums:
    """Compute the policy-gradient loss, summed over tokens; all arrays (N,), nats.

        token, sequence   L = - sum_t min(r_t c_t, clip(r_t, 1 - clip_low, 1 + clip_high) c_t)
        weight            L = - sum_t sg[clip(r_t, 1 - clip_low, 1 + clip_high)] c_t logprob_t
        none              L = - sum_t c_t logprob_t

        r_t = exp(logprob - anchor); for sequence: exp(mean of that over the completion)

    `rows` holds the index of each token's completion. Papers: PPO, Schulman et al. 2017
    (1707.06347); GSPO, Zheng et al. 2025 (2507.18071): "sequence" is its min(s C, clip(s) C) per
    completion, where C is the sum of the coefficients; CISPO, MiniMax 2025 (2506.13585); RLOO,
    Ahmadian et al. 2024 (2402.14740). For fresh tokens the anchor is the log-probability recorded
    by the sampler.
    """
    log_ratio = logprobs - anchor_logprobs
    ratio = mx.exp(_row_means(log_ratio, rows) if objective.ratio == "sequence" else log_ratio)
    lowest, highest = 1 - objective.clip_low, 1 + objective.clip_high
    clipped_ratio = mx.clip(ratio, lowest, highest)
    low_active, high_active = coefficients < 0, coefficients > 0
    if objective.ratio == "none":
        surrogate = coefficients * logprobs
        low_active = high_active = mx.array(False)
    elif objective.ratio == "weight":
        surrogate = mx.stop_gradient(clipped_ratio) * coefficients * logprobs
        low_active = high_active = coefficients != 0
    else:
        surrogate = mx.minimum(ratio * coefficients, clipped_ratio * coefficients)
    gap = mx.abs(log_ratio)
    return ObjectiveSums(
        loss=-surrogate.sum(),
        clipped_low=((ratio < lowest) & low_active).sum(),
        clipped_high=((ratio > highest) & high_active).sum(),
        gap=gap.sum(),
        gap_max=gap.max(),
        kl=mx.array(0.0),
    )


def kl_terms(
    estimator: str, logprobs: mx.array, ref_logprobs: mx.array, anchor_logprobs: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loss and the value of KL(policy, reference) per token; all arrays (N,), nats.

        d = logprob - ref logprob,   r = exp(logprob - anchor)

              value               loss        its gradient on fresh tokens
        k1    d                   r sg[d]     d grad logprob             KL(policy, reference)
        k2    d^2 / 2             the value   d grad logprob             KL(policy, reference)
        k3    exp(-d) - 1 + d     the value   (1 - exp(-d)) grad logprob KL(reference, policy)

    The last column is the divergence whose gradient is the mean gradient. As values k1 and k3 are
    unbiased and k2 is not (Schulman 2020, joschu.net/blog/kl-approx.html). The mean gradient of d
    itself is 0, so k1 is applied as in its original use, a penalty in the reward, without the part
    of future tokens; on fresh tokens it equals k2, and on later updates it is corrected by r (Liu
    et al. 2025, 2510.01555). k3 as a loss is GRPO's (Shao et al. 2024, 2402.03300).
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return mx.exp(logprobs - anchor_logprobs) * mx.stop_gradient(d), d
    value = mx.square(d) / 2 if estimator == "k2" else mx.exp(-d) - 1 + d
    return value, value


def _row_means(values: mx.array, rows: np.ndarray) -> mx.array:
    """Mean over each row, repeated at every position of the row; (N,)."""
    counts = np.bincount(rows)
    sums = mx.zeros((len(counts),)).at[mx.array(rows)].add(values)
    return (sums / mx.array(np.maximum(counts, 1).astype(np.float32)))[mx.array(rows)]
