"""Guessing a number in several turns: each guess is answered with higher or lower.

    prompt  I am thinking of a whole number from 37 to 51. Guess it: ...
    answer  42

The operands are the ends of the range and the number. Halving the remaining range finds any number
in 3 or 4 guesses. Also runs in a spawned child: plain Python.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

NAME = "guessing"
DIFFICULTIES = (1, 2, 3)
ENVIRONMENT = "localrl.tasks.guessing:Guess"
REWARD = None
"""None: the environment gives the reward."""

SIZES = {1: (6, 9), 2: (10, 12), 3: (13, 15)}
"""Smallest and largest size of the range, by level."""
LARGEST = 99

RULES = (
    "Guess it: write one number, and I will say whether mine is higher or lower. "
    "Use as few guesses as you can."
)
REPEAT = "Write one number"
"""Reply to a turn without a number; the range follows."""


def draw(rng: Random, difficulty: int) -> tuple[str, ...]:
    """Draw the operands, each uniform: lowest number, highest number, the number itself."""
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
    """The hold-out key: the range with all its numbers, so no evaluation prompt is trained on."""
    return NAME, operands[:2]


class Guess:
    """The environment that knows the number; it plays in text."""

    def reset(self, answer: str, low: int, high: int, **row: Any) -> None:
        """Begin a game; adds nothing to the prompt."""
        self.number, self.low, self.high = int(answer), low, high
        self.found = False

    def step(self, text: str) -> str | None:
        """Answer a guess, the last whole number after any reasoning. None once it is found."""
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
    """The last whole number after the last </think>, if it has at most 9 digits, else None."""
    said = text.rpartition("</think>")[2]
    numbers = re.findall(r"[0-9]+", said)
    return int(numbers[-1]) if numbers and len(numbers[-1]) <= 9 else None
