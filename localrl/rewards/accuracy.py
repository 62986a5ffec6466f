"""Rewards for right answers: numbers, multiple choice, text. Plain Python, no math library.

They share TRL's names. TRL's own versions read any LaTeX with math-verify; `accuracy_reward` lists
what these do and do not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import (
    GSM8K,
    THOUGHT_END,
    as_words,
    choice,
    last_boxed,
    last_choice,
    last_line,
    stated,
    without_thought,
)
from localrl.rewards.rational import MAX_ANSWER, Number, last_number, read_number

LogExtra = Callable[[str, list[Any]], None]

SHOWN = 200
"""Number of characters of an answer that are logged."""


@dataclass(frozen=True)
class Gold:
    """The gold answer as parsed: a number, a letter, or else words."""

    words: str
    number: Number | None = None
    letter: str | None = None


def accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 if a completion's answer matches the gold answer, else 0.0; None without a gold answer.

    The gold answer is `solution`, or `answer` if that is missing: a number or text. In a text with
    #### or \\boxed{} it is the part that these mark. It is unreadable, and the reward None, if it
    is empty, longer than 2000 characters, or neither text nor number.

    A completion's answer is its last \\boxed{}; without one, the text after the last </think>
    in <answer> tags, after #### or after "answer is" or "answer:"; without these, the last line.
    A gold number is compared with the last number in that text, or in the whole completion.

    Numbers are compared as exact fractions: 0.5, 1/2 and \\frac{1}{2} are equal, 0.33 and 1/3 are
    not. Commas, currency signs and % are dropped (20% is 20, not 0.2). Units must not conflict,
    but one may be missing. A gold letter A to Z matches B, (b), B. and B) Paris. Texts are
    compared ignoring case, spaces and LaTeX formatting.

    Not parsed: roots, constants, powers except of ten, equations, intervals and sets in another
    order, numbers in words, more than 1000 digits. These are compared as text.
    """
    golds = _golds(solution, answer, len(completions))
    answers = [
        None if gold is None else _answer(text_of(completion), gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]
    _log(log_extra, golds, answers)
    return [
        None if gold is None else float(_right(found, gold))
        for found, gold in zip(answers, golds, strict=True)
    ]


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any] | None = None,
    reasoning_delimiters: Sequence[str] | None = None,
    answer: Sequence[Any] | None = None,
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of the text after the reasoning; 0.0 if the reasoning does not end.

    reasoning_delimiters: texts that end it, </think> by default. The first one in the list that
        occurs is used, at its last occurrence.
    """
    delimiters = reasoning_delimiters or (THOUGHT_END,)
    texts = [_after(text_of(completion), delimiters) for completion in completions]
    rewards = accuracy_reward([text or "" for text in texts], solution, answer, log_extra)
    pairs = zip(texts, rewards, strict=True)
    return [0.0 if text is None else reward for text, reward in pairs]


def choice_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 if the completion chooses the gold letter, else 0.0; None if the gold is not a letter.

    Letters are found as in `accuracy_reward`, and in the last line as B, B. or (B).
    """
    golds = _golds(solution, answer, len(completions))
    letters = [choice(gold.words) if gold else None for gold in golds]
    return [
        None if letter is None else float(_chosen(text_of(completion)) == letter)
        for completion, letter in zip(completions, letters, strict=True)
    ]


def read_gold(value: Any) -> Gold | None:
    """Parse the gold answer from a column's value; None if it cannot be read."""
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
    if not as_words(text) or len(text) > MAX_ANSWER:
        return None
    number = read_number(text)
    return Gold(text, number, None if number else _gold_letter(text))


def _gold_letter(text: str) -> str | None:
    """Letter of B, (b), B. or B) Paris, but not of b: one small letter is probably a variable."""
    return None if len(text) == 1 and text.islower() else choice(text)


def _golds(
    solution: Sequence[Any] | None, answer: Sequence[Any] | None, count: int
) -> list[Gold | None]:
    if solution is None and answer is None:
        raise ValueError("there is neither a `solution` nor an `answer` column")
    nothing = [None] * count
    pairs = zip(solution or nothing, answer or nothing, strict=True)
    return [read_gold(second if first is None else first) for first, second in pairs]


def _answer(text: str, gold: Gold) -> Number | str | None:
    """A completion's answer, in the same form as the gold answer; None if it gives none."""
    if gold.letter is not None:
        return _chosen(text)
    boxed = last_boxed(text)
    if gold.number is not None:
        return _number(text) if boxed is None else read_number(boxed)
    if boxed is not None:
        return as_words(boxed)
    statement = stated(text)
    return as_words(last_line(text) if statement is None else statement)


def _number(text: str) -> Number | None:
    statement = stated(text)
    if statement is None:
        return last_number(without_thought(text))
    found = read_number(statement) or last_number(statement)
    return found or last_number(without_thought(text))


def _chosen(text: str) -> str | None:
    boxed = last_boxed(text)
    if boxed is not None:
        return choice(boxed)
    statement = stated(text)
    return last_choice(text if statement is None else statement)


def _right(found: Number | str | None, gold: Gold) -> bool:
    if isinstance(found, Number):
        return gold.number is not None and found.agrees(gold.number)
    expected = as_words(gold.words) if gold.letter is None else gold.letter
    return found is not None and found == expected


def _after(text: str, delimiters: Sequence[str]) -> str | None:
    for delimiter in delimiters:
        if delimiter in text:
            return text.rpartition(delimiter)[2]
    return None


def _log(
    log_extra: LogExtra | None,
    golds: Sequence[Gold | None],
    answers: Sequence[Number | str | None],
) -> None:
    if log_extra is not None:
        log_extra("gold_parsed", [gold and _shown(gold.number or gold.words) for gold in golds])
        log_extra("answer_parsed", [_shown(answer) for answer in answers])


def _shown(value: Number | str | None) -> str | None:
    if isinstance(value, Number):
        value = f"{value.value} {value.unit}".strip()
    return value if value is None or len(value) <= SHOWN else f"{value[:SHOWN]}..."
