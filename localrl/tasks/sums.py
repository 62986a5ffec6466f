"""Sums of four to six two-digit numbers.

    prompt  sum 47 85 36 12
    answer  180

A policy that reasons keeps a running total. The embedded model writes it with its digits reversed,
lowest digit first, so that carries flow in writing order:

    740;+58=231;+63=861;+21=081;#180
"""

from __future__ import annotations

from random import Random

NAME = "sums"
DIFFICULTIES = (4, 5, 6)
"""Levels: the number of terms."""


def draw(rng: Random, difficulty: int) -> tuple[str, ...]:
    """Draw the operands: `difficulty` numbers, each uniform in 10..99, as written in the prompt."""
    return tuple(str(rng.randint(10, 99)) for _ in range(difficulty))


def prompt(operands: tuple[str, ...]) -> str:
    """The user's message."""
    return "sum " + " ".join(operands)


def answer(operands: tuple[str, ...]) -> str:
    """The total in ordinary digits."""
    return str(sum(map(int, operands)))
