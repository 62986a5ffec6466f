"""Prompt weightings: one factor on all advantages of a group, a function of its rewards alone.

For rewards of 0 and 1 such a factor does not change the direction of a prompt's gradient; it only
multiplies it by some w(p), where p is the prompt's success probability. Many named methods differ
only in this.

The factor multiplies *leave-one-out* advantages, those of `assign_credit` for a flat group with
kappa 0. They are G/(G-1) times r - mean(r), so a paper's factor on r - mean(r) includes (G-1)/G
here, and the product is the paper's advantage.

| name | advantage of completion i | paper | w(p) |
|---|---|---|---|
| none | r_i - mean of the others | RLOO, Ahmadian et al. 2024 (2402.14740) | 1 |
| mean | r_i - mean(r) | Dr. GRPO, Liu et al. 2025 (2503.20783) | (G-1)/G |
| std | (r_i - mean(r)) / (std(r) + 1e-4) | GRPO, Shao et al. 2024 (2402.03300) | about 1/std(p) |
| maxrl | (r_i - mean(r)) / mean(r) | MaxRL, Tajwar et al. 2026 (2602.02710) | (1-(1-p)^(G-1))/p |

std(r) has G-1 in its denominator, as in TRL; std(p) is sqrt(p(1-p)). With few completions w(p) of
`std` drops near 0 and 1, where most groups have equal rewards; `effective_weight` is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from statistics import fmean, stdev

from localrl.config import closest
from localrl.errors import ConfigError

STD_EPSILON = 1e-4
"""TRL's epsilon for the standard deviation, in units of reward."""


def prompt_weight(name: str, rewards: Sequence[float]) -> float:
    """Compute the factor on all leave-one-out advantages of a group from its known rewards.

    It is finite for any finite rewards. If a paper's advantages are all 0 the factor is 0, so that
    the tracker's baseline is not amplified: `std` for equal rewards, `maxrl` for a mean that is not
    above 0, all except `none` for a single reward.

    Raises: ConfigError for an unknown name.
    """
    weighting = _weighting(name)
    return weighting(rewards) if rewards else 1.0


def weighting_names() -> tuple[str, ...]:
    """Return the names that `prompt_weight` accepts."""
    return tuple(_WEIGHTINGS)


def effective_weight(name: str, p: float, group_size: int) -> float:
    """Compute w(p), the factor on the gradient of a prompt's success probability p.

        w(p) = sum_{k=1}^{G-1} C(G-2, k-1) p^(k-1) (1-p)^(G-1-k) factor(k ones, G-k zeros)

    It is exact for G = group_size independent rewards of 0 and 1 and leave-one-out advantages: the
    mean of the factor over groups in which a given completion succeeds and another one fails.

    Raises: ConfigError for an unknown name; ValueError for p outside [0, 1] or G below 2.
    """
    if not 0 <= p <= 1 or group_size < 2:
        raise ValueError(f"p = {p} must be in [0, 1] and group_size = {group_size} at least 2.")
    others = group_size - 2
    return sum(
        comb(others, k)
        * p**k
        * (1 - p) ** (others - k)
        * prompt_weight(name, [1.0] * (k + 1) + [0.0] * (group_size - k - 1))
        for k in range(others + 1)
    )


def _weighting(name: str) -> Callable[[Sequence[float]], float]:
    if name not in _WEIGHTINGS:
        known = ", ".join(_WEIGHTINGS)
        raise ConfigError(
            f"Unknown prompt weighting {name!r}.{closest(name, _WEIGHTINGS)} Known: {known}."
        )
    return _WEIGHTINGS[name]


def _one(rewards: Sequence[float]) -> float:
    return 1.0


def _all_in_mean(rewards: Sequence[float]) -> float:
    """Factor (G-1)/G, which turns leave-one-out advantages into r - mean(r)."""
    return (len(rewards) - 1) / len(rewards)


def _inverse_std(rewards: Sequence[float]) -> float:
    # Compare the rewards: rounding can make the deviation of equal ones tiny instead of 0.
    if max(rewards) == min(rewards):
        return 0.0
    return _all_in_mean(rewards) / (stdev(rewards) + STD_EPSILON)


def _inverse_mean(rewards: Sequence[float]) -> float:
    mean = fmean(rewards)
    return _all_in_mean(rewards) / mean if mean > 0 else 0.0


_WEIGHTINGS: dict[str, Callable[[Sequence[float]], float]] = {
    "none": _one,
    "mean": _all_in_mean,
    "std": _inverse_std,
    "maxrl": _inverse_mean,
}
