"""Strict readers of a judge's verdict: a number, a choice or a ranking on its last line.

Anything else is refused: a verdict that has to be guessed at is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from localrl.rewards.extract import without_thought

_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*")
_SCORE = re.compile(rf"({_NUMBER})(?:\s*/\s*({_NUMBER}))?")
_MARKS = " \t*_`#"
"""Characters around a verdict that are only typography."""


class Unreadable(ValueError):
    """Raised for a text that holds no verdict of the form that was asked for."""


@dataclass(frozen=True)
class Range:
    """Scores from `low` to `high`; rewards go from 0 to 1."""

    low: float
    high: float

    @property
    def ask(self) -> str:
        """The request for a verdict."""
        worst, best = f"{self.low:g}", f"{self.high:g}"
        return (
            f"Score the answer with a number from {worst} (worst) to {best} (best). The last line "
            "of your reply has to hold the score alone, in the form\nScore: <number>"
        )

    def read(self, text: str) -> float:
        """Return the reward for a judge's text.

        Raises: Unreadable.
        """
        line = _last_line(text, "score")
        match = _SCORE.fullmatch(line)
        if match is None:
            raise Unreadable(f"its last line is {line!r:.80}, not a score alone")
        if match[2] is not None and float(match[2]) != self.high:
            raise Unreadable(f"its score {line!r:.80} is not out of {self.high:g}")
        if not self.low <= float(match[1]) <= self.high:
            raise Unreadable(f"its score {line!r:.80} is not from {self.low:g} to {self.high:g}")
        return (float(match[1]) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Choices:
    """Words to choose from, in small letters, each with its reward."""

    rewards: Mapping[str, float]

    @property
    def ask(self) -> str:
        """The request for a verdict."""
        return (
            f"Choose one of: {', '.join(self.rewards)}. The last line of your reply has to hold "
            "the choice alone, in the form\nScore: <choice>"
        )

    def read(self, text: str) -> float:
        """Return the reward for a judge's text.

        Raises: Unreadable.
        """
        line = _last_line(text, "score")
        if line.lower() not in self.rewards:
            raise Unreadable(f"its last line is {line!r:.80}, not one of {', '.join(self.rewards)}")
        return self.rewards[line.lower()]


Scale = Range | Choices


def read_scale(text: str) -> Scale:
    """Read a scale: `0-10`, or choices with their rewards, as in `yes=1, no=0`.

    Raises: ValueError if it is neither.
    """
    problem = f"scale is {text!r}; write it as in 0-10, or as in yes=1, no=0"
    if match := _RANGE.fullmatch(text):
        low, high = float(match[1]), float(match[2])
        if not low < high:
            raise ValueError(f"{problem}, the lower one first")
        return Range(low, high)
    rewards: dict[str, float] = {}
    for part in text.split(","):
        word, equals, value = (piece.strip() for piece in part.partition("="))
        if not (word and equals and re.fullmatch(_NUMBER, value)):
            raise ValueError(problem)
        if word.lower() in rewards or word != word.strip(f"{_MARKS}.:"):
            raise ValueError(f"{problem}; {word!r} occurs twice, or has marks around it")
        rewards[word.lower()] = float(value)
    if len(rewards) < 2:
        raise ValueError(f"{problem}; there have to be at least two choices")
    return Choices(rewards)


def ask_ranking(count: int) -> str:
    """Return the request to rank this many answers."""
    return (
        f"Rank the {count} answers. The last line of your reply has to hold the numbers of all of "
        "them, the best first, with > between them, and = between two that are equally good, as "
        "in\nRanking: " + " > ".join(str(number) for number in range(count, 0, -1))
    )


def read_ranking(text: str, count: int) -> list[float]:
    """Return the reward of each answer: the share of the others that it beats, a tie being half.

    Raises: Unreadable, unless each of the numbers 1 to `count` occurs once.
    """
    line = _last_line(text, "ranking")
    if not re.fullmatch(r"[0-9]{1,4}(?:\s*[>=]\s*[0-9]{1,4})*", line):
        raise Unreadable(f"its last line is {line!r:.80}, not a ranking alone")
    tiers = [[int(number) for number in tier.split("=")] for tier in line.split(">")]
    if sorted(number for tier in tiers for number in tier) != list(range(1, count + 1)):
        raise Unreadable(f"its ranking {line!r:.80} does not name each of {count} answers once")
    rewards, behind = [math.nan] * count, count
    for tier in tiers:
        behind -= len(tier)
        for number in tier:
            rewards[number - 1] = (behind + (len(tier) - 1) / 2) / (count - 1)
    return rewards


def _last_line(text: str, label: str) -> str:
    """Return the last line after the thought, without marks and without `label:` before it."""
    lines = without_thought(text).strip().splitlines()
    line = lines[-1].strip(_MARKS) if lines else ""
    head, colon, rest = line.partition(":")
    if colon and head.strip(_MARKS).lower() == label:
        line = rest.strip(_MARKS)
    return line.removesuffix(".").strip(_MARKS)
