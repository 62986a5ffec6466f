"""Sorting four to six different letters into alphabetical order.

    prompt  sort kgbpa
    answer  abgkp

A policy that reasons repeatedly takes the smallest remaining letter. The embedded model lists the
remaining letters, then names the smallest:

    kgbpa;kgbpa>a;kgbp>b;kgp>g;kp>k;#abgkp
"""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

NAME = "sorting"
DIFFICULTIES = (4, 5, 6)
"""Levels: the number of letters."""


def draw(rng: Random, difficulty: int) -> tuple[str, ...]:
    """Draw the operands: `difficulty` different letters in random order."""
    return tuple(rng.sample(ascii_lowercase, difficulty))


def prompt(operands: tuple[str, ...]) -> str:
    """The user's message."""
    return "sort " + "".join(operands)


def answer(operands: tuple[str, ...]) -> str:
    """The letters in alphabetical order, without spaces."""
    return "".join(sorted(operands))
