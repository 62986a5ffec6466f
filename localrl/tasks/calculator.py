"""Products that are hard in the head, with a calculator at hand.

    prompt  What is 47 times 85?
    answer  3995

A model may call the tool or answer at once; what counts is its last message.
"""

from __future__ import annotations

from random import Random

from localrl.tasks.family import ACCURACY, Operands

NAME = "calculator"
DIFFICULTIES = (1, 2, 3)
ENVIRONMENT = "localrl.tasks.calculator_tool:Calculator"
REWARD = ACCURACY

DIGITS = {1: (2, 2), 2: (3, 2), 3: (3, 3)}
"""Digits of the two factors, by level."""


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: two factors, each uniform among those of its length, in any order."""
    factors = [str(rng.randint(10 ** (d - 1) + 1, 10**d - 1)) for d in DIGITS[difficulty]]
    rng.shuffle(factors)
    return tuple(factors)


def prompt(operands: Operands) -> str:
    """The text a person would type."""
    return f"What is {operands[0]} times {operands[1]}?"


def answer(operands: Operands) -> str:
    """The product."""
    return str(int(operands[0]) * int(operands[1]))
