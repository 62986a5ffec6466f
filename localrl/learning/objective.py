"""The surrogate losses and the KL terms, as functions from arrays to sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localrl.backend import mx
from localrl.learning.objectives import Objective

MOST_CORRECTION = 2.0
"""C: maximum weight that corrects a token for the sampler's rounding."""


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums over the tokens of a micro-batch; those of a step add up exactly."""

    loss: mx.array
    clipped_low: mx.array
    clipped_high: mx.array
    gap: mx.array
    """Sum of |first - anchor| log-probability."""
    gap_max: mx.array
    truncated: mx.array
    """Number of tokens whose correction was cut to `MOST_CORRECTION`."""
    kl: mx.array
    """Sum of KL values times their weights."""


def policy_sums(
    objective: Objective,
    logprobs: mx.array,
    first_logprobs: mx.array,
    anchor_logprobs: mx.array,
    coefficients: mx.array,
    rows: np.ndarray,
) -> ObjectiveSums:
    """Compute the policy-gradient loss, summed over tokens; all arrays (N,), nats.

        r_t = exp(logprob - first); for sequence: exp(mean of that over the completion)
        c_t = w_t * coefficient_t,   w_t = sampler_correction(first, anchor)

        token, sequence   L = - sum_t min(r_t c_t, clip(r_t, 1 - clip_low, 1 + clip_high) c_t)
        weight            L = - sum_t sg[clip(r_t, 1 - clip_low, 1 + clip_high)] c_t logprob_t
        none              L = - sum_t c_t logprob_t

    `first` is the update's own log-probability in the first pass of the step, a constant, so in the
    step's first update every ratio is exactly 1 in any precision and the gradient is the sum of
    c_t grad logprob_t. `anchor` is the sampler's record. `rows` holds the index of each token's
    completion.

    Papers: the two policies, one to clip around and one to correct for, are those of decoupled PPO,
    Hilton et al. 2021 (2110.00641); PPO, Schulman et al. 2017 (1707.06347); GSPO, Zheng et al. 2025
    (2507.18071): "sequence" is its min(s C, clip(s) C) per completion, where C is the sum of c_t;
    CISPO, MiniMax 2025 (2506.13585), whose weight times w_t is its ratio to the sampler; RLOO,
    Ahmadian et al. 2024 (2402.14740): REINFORCE without a ratio, of which w_t makes truncated
    importance sampling.
    """
    log_ratio = logprobs - first_logprobs
    ratio = mx.exp(_row_means(log_ratio, rows) if objective.ratio == "sequence" else log_ratio)
    lowest, highest = 1 - objective.clip_low, 1 + objective.clip_high
    clipped_ratio = mx.clip(ratio, lowest, highest)
    weighted = sampler_correction(first_logprobs, anchor_logprobs) * coefficients
    low_active, high_active = coefficients < 0, coefficients > 0
    if objective.ratio == "none":
        surrogate = weighted * logprobs
        low_active = high_active = mx.array(False)
    elif objective.ratio == "weight":
        surrogate = mx.stop_gradient(clipped_ratio) * weighted * logprobs
        low_active = high_active = coefficients != 0
    else:
        # Of equal arguments the second gets the gradient, so a ratio on the edge still learns.
        surrogate = mx.minimum(clipped_ratio * weighted, ratio * weighted)
    gap = first_logprobs - anchor_logprobs
    return ObjectiveSums(
        loss=-surrogate.sum(),
        clipped_low=((ratio < lowest) & low_active).sum(),
        clipped_high=((ratio > highest) & high_active).sum(),
        gap=mx.abs(gap).sum(),
        gap_max=mx.abs(gap).max(),
        truncated=(mx.exp(gap) > MOST_CORRECTION).sum(),
        kl=mx.array(0.0),
    )


def sampler_correction(first_logprobs: mx.array, anchor_logprobs: mx.array) -> mx.array:
    """Compute w = min(exp(first - anchor), C) per token (N,), C = `MOST_CORRECTION`.

    Sampler and update compute one policy in different batch shapes, so in 16 bits they round it to
    different distributions. This is the truncated importance weight between the two (Ionides 2008,
    doi 10.1198/106186008X320456; for rollouts Yao et al. 2025, openreview 8MHqvb4lK9; TRL's
    `token_truncate`). In float32 it is 1 up to about 1e-6.
    """
    return mx.minimum(mx.exp(first_logprobs - anchor_logprobs), MOST_CORRECTION)


def kl_terms(
    estimator: str, logprobs: mx.array, ref_logprobs: mx.array, ratio: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loss and the value of KL(policy, reference) per token; all arrays (N,), nats.

        d = logprob - ref logprob,   r = the ratio to the sampler, with its gradient

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
        return ratio * mx.stop_gradient(d), d
    value = mx.square(d) / 2 if estimator == "k2" else mx.exp(-d) - 1 + d
    return value, value


def _row_means(values: mx.array, rows: np.ndarray) -> mx.array:
    """Mean over each row, repeated at every position of the row; (N,)."""
    counts = np.bincount(rows)
    sums = mx.zeros((len(counts),)).at[mx.array(rows)].add(values)
    return (sums / mx.array(np.maximum(counts, 1).astype(np.float32)))[mx.array(rows)]
