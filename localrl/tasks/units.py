"""Conversions between units, in words.

    prompt  How many centimetres are 37 metres? ...
    answer  3700

The levels are: a larger unit to a smaller one; a smaller one to a larger one, with decimals; two
units together in the smaller of them; a rate over a time. All answers are exact.
"""

from __future__ import annotations

from decimal import Decimal
from random import Random

from localrl.tasks.family import ACCURACY, REASON, Operands

NAME = "units"
DIFFICULTIES = (1, 2, 3, 4)
REWARD = ACCURACY

SIZES = {
    "length": {"millimetres": 1, "centimetres": 10, "metres": 1000, "kilometres": 1000_000},
    "mass": {"milligrams": 1, "grams": 1000, "kilograms": 1000_000, "tonnes": 1000_000_000},
    "volume": {"millilitres": 1, "centilitres": 10, "litres": 1000, "hectolitres": 100_000},
    "time": {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400, "weeks": 604_800},
    "imperial": {"inches": 1, "feet": 12, "yards": 36, "miles": 63_360},
}
"""Size of each unit, in the smallest unit of its kind."""
UNITS = {unit: size for units in SIZES.values() for unit, size in units.items()}
METRIC = ("length", "mass", "volume")


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: the kind of question, its amounts, and its units."""
    if difficulty == 1:
        smaller, larger = _neighbours(rng, rng.choice(tuple(SIZES)))
        return ("down", str(rng.randint(2, 400)), larger, smaller)
    if difficulty == 2:
        smaller, larger = _neighbours(rng, rng.choice(METRIC))
        tenths = 10 * rng.randint(1, 99) + rng.randint(1, 9)
        return ("up", str(tenths * UNITS[larger] // UNITS[smaller] // 10), smaller, larger)
    if difficulty == 3:
        smaller, larger = _neighbours(rng, rng.choice(tuple(SIZES)))
        rest = rng.randint(2, max(2, UNITS[larger] // UNITS[smaller] - 1))
        return ("both", str(rng.randint(2, 60)), str(rest), larger, smaller)
    smaller, larger = _neighbours(rng, rng.choice(METRIC))
    return ("rate", str(rng.randint(2, 90)), str(3 * rng.randint(2, 19)), larger, smaller)


def question(operands: Operands) -> str:
    """The question, without instructions on how to answer."""
    kind, amount, *rest = operands
    new = rest[-1]
    if kind == "both":
        return f"How many {new} are {amount} {rest[1]} and {rest[0]} {new} together?"
    if kind == "rate":
        return (
            f"A machine makes {amount} {rest[1]} of its product per hour. "
            f"How many {new} does it make in {rest[0]} minutes?"
        )
    return f"How many {new} are {amount} {rest[0]}?"


def prompt(operands: Operands) -> str:
    """The user's message."""
    return f'{question(operands)} {REASON} "Answer: " followed by the number.'


def answer(operands: Operands) -> str:
    """The number in the requested unit."""
    kind, amount, *rest = operands
    new = UNITS[rest[-1]]
    if kind == "both":
        return _exact(Decimal(amount) * UNITS[rest[1]] / new + int(rest[0]))
    if kind == "rate":
        return _exact(Decimal(amount) * UNITS[rest[1]] * int(rest[0]) / (60 * new))
    return _exact(Decimal(amount) * UNITS[rest[0]] / new)


def _neighbours(rng: Random, kind: str) -> tuple[str, str]:
    """A unit and the next larger one."""
    units = tuple(SIZES[kind])
    smaller = rng.randrange(len(units) - 1)
    return units[smaller], units[smaller + 1]


def _exact(value: Decimal) -> str:
    """Format the number without an exponent or trailing zeros."""
    return f"{value.normalize():f}"
