"""Rounds: a group is sampled in parts, later ones only for prompts worth the extra tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localrl.records import Group, ScoredGroup
from localrl.rollouts.groups import Shape, join

Sample = Callable[[Sequence[int], int], list[Group]]
"""Samples one round for the prompts with these indices; rounds are numbered from 0."""
Score = Callable[[Sequence[Group]], list[ScoredGroup]]
Belief = Callable[[int], tuple[float, float]]
"""Returns the Beta parameters of a prompt's success rate, as estimated before the step."""
GIVE_UP = 0.9
"""Probability of staying uniform above which a prompt gets no further round."""


def collect(
    count: int,
    shape: Shape,
    sample: Sample,
    score: Score,
    *,
    belief: Belief,
    place: Callable[[float], float],
) -> list[ScoredGroup]:
    """Sample and score groups for `count` prompts: one round for all, then more where worthwhile.

    With a single round this only samples and scores. `place` maps a reward to 0..1. After each
    round a prompt continues while all its rewards are equal and the probability that they would
    stay equal up to the last round is at most `GIVE_UP`. The idea of rounds is that of Xiong et al.
    2025 (Reinforce-Ada, arXiv 2510.04996); we divide by the planned number instead of selecting,
    see `assign_credit`.
    """

    def places(group: ScoredGroup) -> list[float]:
        return [place(reward) for reward in group.rewards if reward is not None]

    groups = score(sample(range(count), 0))
    for number in range(1, shape.rounds):
        left = (shape.rounds - number) * shape.roots
        going = [
            i
            for i, group in enumerate(groups)
            if alike(group) and chance_alike(places(group), belief(i), left) <= GIVE_UP
        ]
        if not going:
            break
        for i, more in zip(going, score(sample(going, number)), strict=True):
            groups[i] = join(groups[i], more)
    return groups


def alike(scored: ScoredGroup) -> bool:
    """Return True if there are rewards and all of them are equal."""
    return len({reward for reward in scored.rewards if reward is not None}) == 1


def chance_alike(rewards: Sequence[float], belief: tuple[float, float], left: int) -> float:
    """Probability that `left` more completions all get the same outcome as the existing ones.

        prod_{i < left} (same + i) / (right + wrong + i)

    where right and wrong are the belief updated with the rewards (beta-binomial), and same is
    whichever of the two the rewards were.
    """
    right = belief[0] + sum(rewards)
    wrong = belief[1] + len(rewards) - sum(rewards)
    same = right if rewards[0] > 0.5 else wrong
    chance = 1.0
    for i in range(left):
        chance *= (same + i) / (right + wrong + i)
    return chance
