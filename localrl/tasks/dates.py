"""Questions about days and dates, in words.

    prompt  How many days is it from 3 March 2024 to 17 April 2024? ...
    answer  45

There are five kinds of question, one per level. Dates in operands are days since the year 1.
"""

from __future__ import annotations

from datetime import date
from random import Random

from localrl.tasks.family import ACCURACY, REASON, Operands

NAME = "dates"
DIFFICULTIES = (1, 2, 3, 4, 5)
REWARD = ACCURACY

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

FIRST, LAST = date(1950, 1, 1).toordinal(), date(2049, 12, 31).toordinal()
FORMS = {
    "later": "the day of the week",
    "add": "the date as YYYY-MM-DD",
    "between": "the number of days",
    "weekday": "the day of the week",
}
"""Form of the answer to each kind of question."""


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: the kind of question, and two numbers."""
    day = rng.randint(FIRST, LAST)
    if difficulty == 1:
        return ("later", str(rng.randrange(7)), str(rng.randint(2, 500)))
    if difficulty == 2:
        return ("add", str(day), str(rng.randint(2, 60)))
    if difficulty == 3:
        return ("between", str(day), str(day + rng.randint(2, 120)))
    if difficulty == 4:
        return ("weekday", str(day), str(day + rng.randint(20, 365)))
    return ("between", str(day), str(day + rng.randint(200, 1500)))


def question(operands: Operands) -> str:
    """The question, without instructions on how to answer."""
    kind, first, second = operands[0], int(operands[1]), int(operands[2])
    if kind == "later":
        return f"Today is {WEEKDAYS[first]}. What day of the week is it in {second} days?"
    if kind == "add":
        return f"What is the date {second} days after {_spoken(first)}?"
    if kind == "weekday":
        return (
            f"{_spoken(first)} is a {_weekday(first)}. What day of the week is {_spoken(second)}?"
        )
    return f"How many days is it from {_spoken(first)} to {_spoken(second)}?"


def prompt(operands: Operands) -> str:
    """The user's message."""
    return f'{question(operands)} {REASON} "Answer: " followed by {FORMS[operands[0]]}.'


def answer(operands: Operands) -> str:
    """A day of the week, a date as YYYY-MM-DD, or a number of days."""
    kind, first, second = operands[0], int(operands[1]), int(operands[2])
    if kind == "later":
        return WEEKDAYS[(first + second) % 7]
    if kind == "add":
        return date.fromordinal(first + second).isoformat()
    return _weekday(second) if kind == "weekday" else str(second - first)


def _spoken(ordinal: int) -> str:
    day = date.fromordinal(ordinal)
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _weekday(ordinal: int) -> str:
    return WEEKDAYS[date.fromordinal(ordinal).weekday()]
