"""Text that models and users wrote, on its way to people."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs"}
"""Unicode categories of characters that drive a terminal, turn a line around, or have no UTF-8."""


def printable(text: str) -> str:
    """The text without characters that could drive a terminal; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else "\ufffd" for c in text
    )


def sampled_at(temperature: float) -> str:
    """How completions were drawn, in words."""
    return f"temperature {temperature:g}" if temperature else "greedy"


def one_line(text: str, width: int = 0) -> str:
    """As `printable`, line ends and tabs as signs, cut to `width` characters unless that is 0."""
    line = printable(text).replace("\n", "↵").replace("\t", "⇥")
    return line[: width - 1] + "…" if width and len(line) > width else line
