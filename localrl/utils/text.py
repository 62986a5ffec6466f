"""Makes text written by models and users safe to show."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs"}
"""Unicode categories of characters that drive a terminal, reverse a line, or have no UTF-8 form."""


def printable(text: str) -> str:
    """Replace characters that could drive a terminal; newlines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else "\ufffd" for c in text
    )


def readable(text: str) -> str:
    """Replace halves of characters (lone surrogates), which no tokenizer reads and no file holds;
    join those that belong together."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sampled_at(temperature: float) -> str:
    """Describe in words how completions were sampled."""
    return f"temperature {temperature:g}" if temperature else "greedy"


def one_line(text: str, width: int = 0) -> str:
    """Make text `printable`, with signs for newlines and tabs; cut to `width` unless it is 0."""
    line = printable(text).replace("\n", "↵").replace("\t", "⇥")
    return line[: width - 1] + "…" if width and len(line) > width else line
