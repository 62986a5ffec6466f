"""Reads gold answers from the columns of the data. Plain Python: runs in a child process.

The one precedence everywhere: `answer`, or `solution` where no answer can be read. A list holds
accepted answers, any of which is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from localrl.rewards.extract import GSM8K, last_boxed
from localrl.rewards.letters import choice
from localrl.rewards.notation import MAX_ANSWER
from localrl.rewards.rational import Number, read_number
from localrl.rewards.words import as_words

Read = TypeVar("Read")
Column = Sequence[Any] | None


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
    number = read_number(text)
    return Gold(text, number, None if number else _letter(text))


def text_of_gold(value: Any) -> str | None:
    """The gold answer as text: after ####, or in the last \\boxed{}; None if it has none."""
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
    text = (value if boxed is None else boxed).strip()
    return text if len(text) <= MAX_ANSWER and as_words(text) else None


def _read_all(value: Any, read: Callable[[Any], Read | None]) -> tuple[Read, ...]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(found for one in values if (found := read(one)) is not None)


def _letter(text: str) -> str | None:
    """Letter of B, (b), B. or B) Paris, but not of b: one small letter is probably a variable."""
    return None if len(text) == 1 and text.islower() else choice(text)
