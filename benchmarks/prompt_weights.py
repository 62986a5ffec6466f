"""What rules of sampling, selection and weighting multiply the gradient of a prompt with.

`python benchmarks/prompt_weights.py` prints the table of prompt_weights.md and writes that file.

Completions of a prompt of success probability p have rewards R of 0 and 1. If the coefficients c
depend on rewards alone, the expected gradient is w(p) times that of p, and p may be taken for the
one parameter of the policy:

    w(p) = E[ sum_i c_i (R_i / p - (1 - R_i) / (1 - p)) ]

Leave-one-out gives 1. All figures are exact: sums over the outcomes that sampling can have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import comb
from pathlib import Path

import numpy as np

from localrl.learning.credit import assign_credit
from localrl.learning.objectives import OBJECTIVES, weigh_prompt
from localrl.records import Example, Group, Leaf, Node, ScoredGroup

Rewards = tuple[int, ...]
"""In the order of sampling; within a round the order does not matter, and ones come first."""

PROBABILITIES = (0.02, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.98)
PAGE = Path(__file__).with_suffix(".md")
MARKER = "<!-- Everything below is written by prompt_weights.py. -->"


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    outcomes: Callable[[float], Iterable[tuple[float, Rewards]]]
    """The rewards that sampling can end with at some p, each with its chance."""
    coefficients: Callable[[Rewards], np.ndarray]
    """One per completion. Completions of one round and reward may stand in for each other, so
    random choices among them need not be averaged over."""

    def weight(self, p: float) -> float:
        """w(p)."""
        return sum(
            chance * float(np.dot(self.coefficients(rewards), scores(rewards, p)))
            for chance, rewards in self.outcomes(p)
        )


def scores(rewards: Rewards, p: float) -> np.ndarray:
    """d log P(R) / dp of every completion."""
    return np.where(np.array(rewards) == 1, 1 / p, -1 / (1 - p))


# How rewards come: chances and rewards, given p.


def fixed(p: float, size: int) -> Iterator[tuple[float, Rewards]]:
    """`size` completions."""
    for k in range(size + 1):
        chance = comb(size, k) * p**k * (1 - p) ** (size - k)
        yield chance, (1,) * k + (0,) * (size - k)


def refilled(p: float, size: int) -> Iterator[tuple[float, Rewards]]:
    """Groups of `size`, drawn again until one is mixed."""
    mixed = [(chance, rewards) for chance, rewards in fixed(p, size) if len(set(rewards)) > 1]
    total = sum(chance for chance, _ in mixed)
    return ((chance / total, rewards) for chance, rewards in mixed)


def in_rounds(
    p: float, size: int, limit: int, enough: Callable[[Rewards], bool], so_far: Rewards = ()
) -> Iterator[tuple[float, Rewards]]:
    """Rounds of `size` until there is enough, `limit` completions at most."""
    if len(so_far) >= limit or enough(so_far):
        yield 1.0, so_far
        return
    for first, new in fixed(p, size):
        for rest, rewards in in_rounds(p, size, limit, enough, so_far + new):
            yield first * rest, rewards


def balanced(rewards: Rewards) -> bool:
    """Two of each outcome or more."""
    return min(sum(rewards), len(rewards) - sum(rewards)) >= 2


def mixed(rewards: Rewards) -> bool:
    """Both outcomes."""
    return len(set(rewards)) == 2


eight = partial(fixed, size=8)
sixteen = partial(fixed, size=16)
refill = partial(refilled, size=8)
ada = partial(in_rounds, size=8, limit=32, enough=balanced)
pairs = partial(in_rounds, size=2, limit=8, enough=mixed)


# Coefficients, given rewards: the project's own.


def scored_group(
    rewards: Rewards, *, planned: int | None = None, round_size: int | None = None
) -> ScoredGroup:
    """A flat group of completions of one token, in one round or in rounds of `round_size`."""
    token, sampled, zero = np.zeros(1, np.int32), np.ones(1, bool), np.zeros(1, np.float32)
    indices = range(len(rewards))
    nodes = tuple(
        Node(-1, token, sampled, zero, zero, round=i // (round_size or len(rewards)))
        for i in indices
    )
    leaves = tuple(Leaf(i, "stop", "") for i in indices)
    group = Group(Example("", ()), (0,), nodes, leaves, planned or len(rewards))
    return ScoredGroup(group, rewards, {})


@cache
def shipped(rewards: Rewards, prompt_weight: str = "none") -> np.ndarray:
    """Of a flat group with kappa 0."""
    scored = scored_group(rewards)
    objective = dataclasses.replace(OBJECTIVES["rloo"], prompt_weight=prompt_weight)
    credit = weigh_prompt(objective, scored, assign_credit(scored))
    return np.array([credit.coefficient(i) for i in range(len(rewards))])


@cache
def in_pairs(rewards: Rewards, round_size: int | None = 2) -> np.ndarray:
    """Sums over what came, divided by 8; baselines know their own round and those before."""
    credit = assign_credit(scored_group(rewards, planned=8, round_size=round_size))
    return np.array([credit.coefficient(i) for i in range(len(rewards))])


# Coefficients, given rewards: rules that are here for comparison only.


def four_of(rewards: Rewards) -> np.ndarray:
    """True for four completions whose rewards have the greatest variance: two of each if can be."""
    ones = np.array(rewards) == 1
    wanted = np.clip(2, 4 - (~ones).sum(), ones.sum())
    return np.where(ones, ones.cumsum() <= wanted, (~ones).cumsum() <= 4 - wanted)


def renormalised(rewards: Rewards) -> np.ndarray:
    """Four of greatest variance, with their own mean and population deviation.

    PODS, Xu et al. 2025 (2504.13818), without weights.
    """
    kept = four_of(rewards)
    values = np.array(rewards)[kept]
    result = np.zeros(len(rewards))
    if values.std() > 0:
        result[kept] = (values - values.mean()) / values.std() / len(values)
    return result


def balanced_four(rewards: Rewards) -> np.ndarray:
    """Two of each outcome, more of one where the other lacks them; minus the mean of the pool.

    Reinforce-Ada, balanced (2510.04996). These are four of greatest variance too.
    """
    return (np.array(rewards) - np.mean(rewards)) * four_of(rewards) / 4


KNOWN = {
    "none": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "std": (2.4, 2.3, 2.2, 1.9, 1.7, 1.9, 2.2, 2.3, 2.4),
    "maxrl": (6.6, 6.0, 5.2, 3.5, 2.0, 1.3, 1.1, 1.1, 1.0),
    "refill": (6.7, 3.0, 1.8, 1.1, 1.0, 1.1, 1.8, 3.0, 6.7),
    "pods": (6.3, 5.4, 4.3, 2.6, 2.0, 2.6, 4.3, 5.4, 6.2),
    "ada": (7.2, 5.9, 4.0, 1.6, 1.0, 1.6, 4.0, 5.9, 7.2),
}
"""Earlier figures at PROBABILITIES: simulated, 10^5 groups each, to one decimal."""

RULES = {
    "none": Rule("`none` (RLOO), 8", eight, shipped),
    "mean": Rule("`mean` (Dr. GRPO), 8", eight, partial(shipped, prompt_weight="mean")),
    "std": Rule("`std` (GRPO), 8", eight, partial(shipped, prompt_weight="std")),
    "maxrl": Rule("`maxrl`, 8", eight, partial(shipped, prompt_weight="maxrl")),
    "rounds": Rule("`none`, rounds of 2 until mixed, up to 8, sum / 8", pairs, in_pairs),
    "refill": Rule("*DAPO's sampling, RLOO: 8, drawn again until mixed*", refill, shipped),
    "pods": Rule("*PODS: 16, keep 4, renormalised*", sixteen, renormalised),
    "ada": Rule("*Reinforce-Ada, balanced: 8 to 32, keep 2 + 2*", ada, balanced_four),
    "hindsight": Rule(
        "*rounds of 2 as above, all rounds in the baseline*",
        pairs,
        partial(in_pairs, round_size=None),
    ),
}
"""Shipped ones first."""


def expected_share(p: float) -> float:
    """E[N] / 8 of rounds of 2 until mixed, up to 8."""
    return sum(chance * len(rewards) / 8 for chance, rewards in pairs(p))


def table() -> Iterator[str]:
    """Lines of a Markdown table; known figures in brackets."""
    yield "| rule | " + " | ".join(f"{p:.2f}" for p in PROBABILITIES) + " |"
    yield "| --- |" + " ---: |" * len(PROBABILITIES)
    for key, rule in RULES.items():
        yield row(rule.name, [rule.weight(p) for p in PROBABILITIES], KNOWN.get(key))
        if key == "rounds":
            yield row("E[N] / 8 of these rounds", [expected_share(p) for p in PROBABILITIES])


def row(name: str, values: Sequence[float], known: Sequence[float] | None = None) -> str:
    """One line of the table."""
    cells = [f"{value:.3f}" for value in values]
    if known:
        cells = [f"{cell} ({figure:.1f})" for cell, figure in zip(cells, known, strict=True)]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    lines = [*table()]
    print("\n".join(lines))
    text = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text("\n".join([text + MARKER, "", *lines, ""]))


if __name__ == "__main__":
    main()
