"""The table of answers in tests/rewards/answers.tsv, which says what each of them should get."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "rewards" / "answers.tsv"
HEAD = ["kind", "reward", "gold", "completion", "verdict", "reason", "math-verify", "difference"]
LINE_END = "\u23ce"
"""Stands for a line end in a completion."""


class Row(NamedTuple):
    """A row of the table."""

    kind: str
    reward: str
    """Name of the built-in reward."""
    gold: str | list[str]
    """The gold answer, or a list of accepted ones."""
    completion: str
    verdict: float
    """The reward that it should get."""
    reason: str
    math_verify: str
    """The reward that `math_verify` gives, "-" where it was not asked."""
    difference: str
    """Why that is another one, "-" where it is the same."""


def read_table() -> list[Row]:
    """Read the table, in its order."""
    head, *lines = FILE.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert head.split("\t") == HEAD
    return [_row(*line.split("\t")) for line in lines]


def _row(kind: str, reward: str, gold: str, completion: str, verdict: str, *notes: str) -> Row:
    golds = gold.split(" || ")
    text = completion.replace(LINE_END, "\n")
    return Row(kind, reward, golds if golds[1:] else gold, text, float(verdict), *notes)
