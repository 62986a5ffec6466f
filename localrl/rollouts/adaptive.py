"""Rounds: a group comes in parts, and later ones only where they are worth their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localrl.records import Group, ScoredGroup
from localrl.rollouts.groups import Shape, join

Sample = Callable[[Sequence[int], int], list[Group]]
"""Sample one round, by its number from 0, for the prompts with these indices."""
Score = Callable[[Sequence[Group]], list[ScoredGroup]]
Belief = Callable[[int], tuple[float, float]]
"""Beta parameters of a prompt's share of right answers, as thought before the step."""


def collect(
    count: int,
    shape: Shape,
    sample: Sample,
    score: Score,
    *,
    belief: Belief,
    place: Callable[[float], float],
    give_up: float,
) -> list[ScoredGroup]:
    """The groups of `count` prompts: a first round for all, then more for those worth it.

    With one round this samples and scores, no more. `place` puts a reward into 0..1. After each
    round a prompt goes on while all its rewards are alike and the chance that this would stay so
    up to its last round is no more than `give_up`. The idea of rounds is that of Xiong et al. 2025
    (Reinforce-Ada, arXiv 2510.04996); we divide by the planned number instead of selecting, see
    `assign_credit`.
    """

    def places(group: ScoredGroup) -> list[float]:
        return [place(reward) for reward in group.rewards if reward is not None]

    groups = score(sample(range(count), 0))
    for number in range(1, shape.rounds):
        left = (shape.rounds - number) * shape.roots
        going = [
            i
            for i, group in enumerate(groups)
            if alike(group) and chance_alike(places(group), belief(i), left) <= give_up
        ]
        if not going:
            break
        for i, more in zip(going, score(sample(going, number)), strict=True):
            groups[i] = join(groups[i], more)
    return groups


def alike(scored: ScoredGroup) -> bool:
    """Whether there are rewards, and all of them are equal."""
    return len({reward for reward in scored.rewards if reward is not None}) == 1


def chance_alike(rewards: Sequence[float], belief: tuple[float, float], left: int) -> float:
    """The chance that `left` more completions all fall on the side of those there are.

        prod_{i < left} (same + i) / (right + wrong + i)

    right and wrong being the belief with the rewards counted in (beta-binomial), and same the one
    of them that the rewards were.
    """
    right = belief[0] + sum(rewards)
    wrong = belief[1] + len(rewards) - sum(rewards)
    same = right if rewards[0] > 0.5 else wrong
    chance = 1.0
    for i in range(left):
        chance *= (same + i) / (right + wrong + i)
    return chance
