"""Sorting four to six different letters into alphabetical order.

    prompt  sort kgbpa
    answer  abgkp

A policy that reasons takes the smallest of the letters that remain, again and again. The embedded
model lists what remains, then names its smallest letter:

    kgbpa;kgbpa>a;kgbp>b;kgp>g;kp>k;#abgkp
"""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

NAME = "sorting"
DIFFICULTIES = (4, 5, 6)
"""How many letters are sorted."""


def draw(rng: Random, difficulty: int) -> tuple[str, ...]:
    """Draw the operands: `difficulty` different letters in random order."""
    return tuple(rng.sample(ascii_lowercase, difficulty))


def prompt(operands: tuple[str, ...]) -> str:
    """The text a person would type."""
    return "sort " + "".join(operands)


def answer(operands: tuple[str, ...]) -> str:
    """The letters in alphabetical order, without spaces."""
    return "".join(sorted(operands))
