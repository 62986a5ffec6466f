"""Writing a string backwards.

prompt  Write the string "kq4v" backwards. ...
answer  v4qk
"""

from __future__ import annotations

from random import Random
from string import ascii_lowercase, digits

from localrl.tasks.family import ACCURACY, REASON, Operands

NAME = "reversal"
DIFFICULTIES = (1, 2, 3, 4)
REWARD = ACCURACY

LENGTHS = {1: (3, 4), 2: (5, 7), 3: (8, 12), 4: (13, 20)}
"""Minimum and maximum number of characters by level."""
CHARACTERS = {1: ascii_lowercase, 2: ascii_lowercase}
"""Alphabets of the levels with letters only; the others have digits too."""


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: the characters, which never form a palindrome."""
    alphabet = CHARACTERS.get(difficulty, ascii_lowercase + digits)
    while True:
        letters = tuple(rng.choice(alphabet) for _ in range(rng.randint(*LENGTHS[difficulty])))
        # With a letter at each end the string is not parsed as a number.
        if letters != letters[::-1] and letters[0].isalpha() and letters[-1].isalpha():
            return letters


def prompt(operands: Operands) -> str:
    """The user's message."""
    text = "".join(operands)
    return f'Write the string "{text}" backwards. {REASON} "Answer: " followed by the new string.'


def answer(operands: Operands) -> str:
    """The characters from the last to the first."""
    return "".join(operands[::-1])
