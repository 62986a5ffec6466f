"""Reward for numbers written in a given base. Plain Python: runs in a child process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import boxed_answer, stated

LONGEST = 300
"""Maximum characters in a conclusion; a longer one is wrong."""

_EDGES = " \t\r\n*_`$\"'.,;!"


def base_reward(
    completions: Sequence[Completion], answer: Sequence[str], base: Sequence[int], **columns: Any
) -> list[float]:
    """1.0 if the conclusion equals the gold number, both read in the problem's base, else 0.0.

    Leading zeros, capital letters, spaces and commas between digits, and Python's prefixes are
    accepted.
    """
    return [
        float(_whole(conclusion(text_of(completion)), radix) == int(gold, radix))
        for completion, gold, radix in zip(completions, answer, base, strict=True)
    ]


def conclusion(text: str) -> str:
    """The content of the last \\boxed{}, else after the last "Answer:"; empty without either."""
    boxed = boxed_answer(text)
    found = ((stated(text) or "") if boxed is None else boxed).strip(_EDGES)
    return found if len(found) <= LONGEST else ""


def _whole(text: str, base: int) -> int | None:
    try:
        return int("".join(text.replace(",", " ").split()), base)
    except ValueError:
        return None
