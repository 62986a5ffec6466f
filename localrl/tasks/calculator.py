"""Products that are hard to compute mentally, with a calculator as a tool.

    prompt  What is 47 times 85?
    answer  3995

A model may call the tool or answer at once; only its last message is scored.
"""

from __future__ import annotations

from random import Random

from localrl.tasks.family import ACCURACY, Operands

NAME = "calculator"
DIFFICULTIES = (1, 2, 3)
ENVIRONMENT = "localrl.tasks.calculator_tool:Calculator"
REWARD = ACCURACY

DIGITS = {1: (2, 2), 2: (3, 2), 3: (3, 3)}
"""Number of digits of the two factors, by level."""


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: two factors in random order, each uniform among those of its length."""
    factors = [str(rng.randint(10 ** (d - 1) + 1, 10**d - 1)) for d in DIGITS[difficulty]]
    rng.shuffle(factors)
    return tuple(factors)


def prompt(operands: Operands) -> str:
    """The user's message."""
    return f"What is {operands[0]} times {operands[1]}?"


def answer(operands: Operands) -> str:
    """The product."""
    return str(int(operands[0]) * int(operands[1]))
