"""Rewards for right answers: numbers, multiple choice, text. Plain Python, no math library.

They share TRL's names. TRL's own versions read any LaTeX with math-verify; `accuracy_reward` lists
what these do and do not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import THOUGHT_END, boxed_answer, last_line, stated, without_thought
from localrl.rewards.golds import Gold, accepted, gold_letter, read_gold
from localrl.rewards.last_numbers import last_number
from localrl.rewards.letters import chosen
from localrl.rewards.rational import Number
from localrl.rewards.statements import read_statement
from localrl.rewards.words import as_words

LogExtra = Callable[[str, list[Any]], None]

SHOWN = 200
"""Number of characters of an answer that are logged."""


_FORMULA = re.compile(r"\$([^$]+)\$(?:[.,;](?:\s.*)?)?", re.DOTALL)


def accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 if a completion's answer matches the gold answer, else 0.0; None without a gold answer.

    The gold answer is `answer`, or `solution` where no answer can be read: a number or text, or a
    list of accepted ones. In a text with #### or \\boxed{} it is the part that these mark. It is
    unreadable, and the reward None, if it is empty, longer than 2000 characters, or neither text
    nor number.

    A completion's answer is, after the last </think>, its last \\boxed{}; without one, the text in
    <answer> tags, after #### or after "answer is" or "answer:"; without these, the last line. For
    a gold number without a box or statement it is the last number in the text, if the words around
    that tell nothing else of it: "3 and 5", "if x is 5", "line 5" and "rounded to 5" do. An answer
    that is denied ("not \\boxed{5}") or taken back ("Wait, that is wrong") is none.

    What is stated is read as a number only if all of it is one, perhaps in a few words: `2*5`,
    `5x`, `x > 5`, `5 million` and "not 5" are no numbers, and none inside or before them is taken.
    Numbers are compared as exact fractions: 0.5, 1/2 and \\frac{1}{2} are equal, 0.33 and 1/3 are
    not. 20% is 20, not 0.2. Units must not conflict, but one may be missing. A gold letter A to Z
    matches B, (b), B. and B) Paris. Texts are compared ignoring case, spaces and LaTeX formatting,
    sets in any order.

    Not evaluated: roots, constants, powers except of ten, sums, equations, numbers in words, more
    than 1000 digits. These are compared as text.
    """
    golds = accepted(answer, solution, len(completions), read_gold)
    found = [
        [(_answer(text_of(completion), gold), gold) for gold in all_golds]
        for completion, all_golds in zip(completions, golds, strict=True)
    ]
    _log(log_extra, found)
    return [float(any(_right(*pair) for pair in pairs)) if pairs else None for pairs in found]


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

    Letters are found as in `accuracy_reward`; see `localrl.rewards.letters.chosen`.
    """
    golds = accepted(answer, solution, len(completions), gold_letter)
    return [
        float(chosen(text_of(completion)) in letters) if letters else None
        for completion, letters in zip(completions, golds, strict=True)
    ]


def _answer(text: str, gold: Gold) -> Number | str | None:
    """A completion's answer, in the same form as the gold answer; None if it gives none."""
    if gold.letter is not None:
        return chosen(text)
    text = without_thought(text)
    boxed = boxed_answer(text)
    statement = stated(text) if boxed is None else boxed
    if gold.number is not None:
        return last_number(text) if statement is None else read_statement(statement)
    return as_words(_formula(last_line(text) if statement is None else statement))


def _formula(text: str) -> str:
    """The formula that a statement begins with, if its sentence ends there; else all of it."""
    found = _FORMULA.fullmatch(text)
    return found[1] if found else text


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
    log_extra: LogExtra | None, found: Sequence[Sequence[tuple[Number | str | None, Gold]]]
) -> None:
    if log_extra is None:
        return
    golds = [[_shown(gold.number or gold.words) or "" for _, gold in pairs] for pairs in found]
    log_extra("gold_parsed", [" or ".join(texts) if texts else None for texts in golds])
    log_extra("answer_parsed", [_shown(pairs[0][0]) if pairs else None for pairs in found])


def _shown(value: Number | str | None) -> str | None:
    if isinstance(value, Number):
        value = f"{value.value} {value.unit}".strip()
    return value if value is None or len(value) <= SHOWN else f"{value[:SHOWN]}..."
