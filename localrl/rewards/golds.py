"""Reads gold answers from the columns of the data. Plain Python: runs in a child process.

The one precedence everywhere: `answer`, or `solution` where no answer can be read. A list holds
accepted answers, any of which is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from localrl.rewards.extract import GSM8K, last_boxed, stated
from localrl.rewards.letters import choice
from localrl.rewards.notation import MAX_ANSWER
from localrl.rewards.rational import Number, read_number
from localrl.rewards.statements import read_statement
from localrl.rewards.words import as_words

Read = TypeVar("Read")
Column = Sequence[Any] | None

_SENTENCES = re.compile(r"[.!?]\s+|\n+")
_TWO_WORDS = re.compile(r"[A-Za-z]{2,},? [A-Za-z]+ ")


@dataclass(frozen=True)
class Gold:
    """The gold answer as parsed: a number, a letter, or else words."""

    words: str
    number: Number | None = None
    letter: str | None = None


def accepted(
    answer: Column, solution: Column, count: int, read: Callable[[Any], Read | None]
) -> list[tuple[Read, ...]]:
    """The accepted answers of each completion as `read` returns them; none if it can read none.

    Raises: ValueError if there is neither column.
    """
    if solution is None and answer is None:
        raise ValueError("there is neither a `solution` nor an `answer` column")
    nothing = [None] * count
    pairs = zip(answer or nothing, solution or nothing, strict=True)
    return [_read_all(first, read) or _read_all(second, read) for first, second in pairs]


def read_gold(value: Any) -> Gold | None:
    """Parse one gold answer; None if it cannot be read."""
    text = text_of_gold(value)
    if text is None:
        return None
    number = read_number(text) or _in_sentence(text)
    return Gold(text, number, None if number else _letter(text))


def gold_letter(value: Any) -> str | None:
    """The letter of a gold answer to a multiple-choice question; None if it is none."""
    text = text_of_gold(value)
    return None if text is None else choice(text)


def text_of_gold(value: Any) -> str | None:
    """The gold answer as text: in the last \\boxed{}, or what the text states; None without one.

    A text states what follows #### or "answer is", or stands in <answer> tags.
    """
    if isinstance(value, (bool, int, float)):
        try:
            value = str(value)
        except ValueError:  # too many digits
            return None
    if not isinstance(value, str):
        return None
    if GSM8K in value:
        value = value.rpartition(GSM8K)[2]
    boxed = last_boxed(value)
    text = ((stated(value) or value) if boxed is None else boxed).strip()
    return text if len(text) <= MAX_ANSWER and as_words(text) else None


def _read_all(value: Any, read: Callable[[Any], Read | None]) -> tuple[Read, ...]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(found for one in values if (found := read(one)) is not None)


def _in_sentence(text: str) -> Number | None:
    """The number that the last sentence of a gold answer gives, as in "So the total is 7."."""
    last = [part for part in _SENTENCES.split(text) if part.strip()][-1:]
    return read_statement(last[0]) if last and _TWO_WORDS.match(last[0]) else None


def _letter(text: str) -> str | None:
    """Letter of B, (b), B. or B) Paris, but not of b: one small letter is probably a variable."""
    return None if len(text) == 1 and text.islower() else choice(text)
