"""Movement of log-probabilities, told from the rounding of 16-bit passes.

Two passes over the same tokens round alike only if shapes and weights are exactly the same. The
smallest change of an adapter flips roundings in every layer: in bfloat16 it moves log-probabilities
by as much as the difference of sampler and update does, about 0.04 nats, whatever its size.
"""

from __future__ import annotations


def beyond_rounding(moved: float, rounding: float) -> float:
    """Return the share of a mean square that rounding does not explain, 0 to 1.

    moved: sum of squared differences between two policies. rounding: the same sum, over as many
    tokens, between two passes of one policy.
    """
    return max(0.0, 1 - rounding / moved) if moved else 0.0
