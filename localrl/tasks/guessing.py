"""Guessing a number in several turns: each guess is answered with higher or lower.

    prompt  I am thinking of a whole number from 37 to 51. Guess it: ...
    answer  42

The operands are the ends of the range and the number. Whoever halves what is left finds any number
in 3 or 4 guesses. Runs in a spawned child too: plain Python.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

NAME = "guessing"
DIFFICULTIES = (1, 2, 3)
ENVIRONMENT = "localrl.tasks.guessing:Guess"
REWARD = None
"""The environment says whether the number was found."""

SIZES = {1: (6, 9), 2: (10, 12), 3: (13, 15)}
"""The fewest and the most numbers in the range, by level."""
LARGEST = 99

RULES = (
    "Guess it: write one number, and I will say whether mine is higher or lower. "
    "Use as few guesses as you can."
)
REPEAT = "Write one number"
"""What is said to a turn without a number, before the range."""


def draw(rng: Random, difficulty: int) -> tuple[str, ...]:
    """Draw the operands: lowest number, highest number, the number itself, each uniform."""
    size = rng.randint(*SIZES[difficulty])
    low = rng.randint(1, LARGEST - size + 1)
    high = low + size - 1
    return (str(low), str(high), str(rng.randint(low, high)))


def prompt(operands: tuple[str, ...]) -> str:
    """The first message."""
    low, high, _ = operands
    return f"I am thinking of a whole number from {low} to {high}. {RULES}"


def answer(operands: tuple[str, ...]) -> str:
    """The number."""
    return operands[2]


def columns(operands: tuple[str, ...]) -> dict[str, Any]:
    """The range, for the environment."""
    return {"low": int(operands[0]), "high": int(operands[1])}


def held_out_as(operands: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """A range is held out with all its numbers, so that no prompt of evaluation is trained on."""
    return NAME, operands[:2]


class Guess:
    """The one who thinks of the number; plays in text."""

    def reset(self, answer: str, low: int, high: int, **row: Any) -> None:
        """Begin a game; the prompt has said all that there is to say."""
        self.number, self.low, self.high = int(answer), low, high
        self.found = False

    def step(self, text: str) -> str | None:
        """Answer a guess: the last whole number behind any reasoning. None once it is found."""
        guess = stated_guess(text)
        self.found = self.found or guess == self.number
        if self.found:
            return None
        if guess is None:
            return f"{REPEAT} from {self.low} to {self.high}."
        return "higher" if guess < self.number else "lower"

    def get_reward(self) -> float:
        """1.0 once the number is found, else 0.0."""
        return float(self.found)


def stated_guess(text: str) -> int | None:
    """The last whole number behind the last </think>, if there is one of at most 9 digits."""
    said = text.rpartition("</think>")[2]
    numbers = re.findall(r"[0-9]+", said)
    return int(numbers[-1]) if numbers and len(numbers[-1]) <= 9 else None
