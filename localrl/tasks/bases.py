"""Writing a number in another base: 2, 8, 10 or 16.

    prompt  Convert the number ff from base 16 to base 10. ...
    answer  255

The operands are the number in base 10, and the two bases.
"""

from __future__ import annotations

from random import Random
from typing import Any

from localrl.tasks.base import RewardSpec
from localrl.tasks.family import REASON, Operands

NAME = "bases"
DIFFICULTIES = (1, 2, 3, 4)
REWARD = RewardSpec("base", "localrl.rewards.bases:base_reward")

RANGES = {1: (8, 511), 2: (512, 4095), 3: (256, 4095), 4: (4096, 65535)}
"""Smallest and largest number by level; the first two levels convert from or to base 10."""
BASES = ("2", "8", "10", "16")
FORMATS = {"2": "b", "8": "o", "10": "d", "16": "x"}


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: number, old base, new base."""
    number = str(rng.randint(*RANGES[difficulty]))
    old, new = rng.sample(BASES, 2)
    while difficulty <= 2 and "10" not in (old, new):
        old, new = rng.sample(BASES, 2)
    return (number, old, new)


def prompt(operands: Operands) -> str:
    """The user's message."""
    number, old, new = operands
    return (
        f"Convert the number {_written(number, old)} from base {old} to base {new}. "
        f'{REASON} "Answer: " followed by the number in base {new}.'
    )


def answer(operands: Operands) -> str:
    """The number in the new base, in lower case."""
    number, _, new = operands
    return _written(number, new)


def columns(operands: Operands) -> dict[str, Any]:
    """The base in which the reward reads an answer."""
    return {"base": int(operands[2])}


def _written(number: str, base: str) -> str:
    return format(int(number), FORMATS[base])
