"""The learning rate over a run."""

from __future__ import annotations

import math


def rate_factor(schedule: str, done: int, *, warmup: int, planned: int) -> float:
    """Compute the factor on the learning rate of the next update, after `done` ones.

        warm-up    (done + 1) / (warmup + 1)     while done < warmup, for every schedule
        constant   1
        linear     1 - x                         x = (done - warmup) / (planned - warmup)
        cosine     (1 + cos(pi x)) / 2

    `planned` is the number of updates of the whole run. The last of them still has a rate above 0.
    """
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    x = min(1.0, (done - warmup) / max(1, planned - warmup))
    return 1 - x if schedule == "linear" else (1 + math.cos(math.pi * x)) / 2
