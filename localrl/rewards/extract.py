"""Finds the answer that a completion states. Plain Python, linear in the length of the text."""

from __future__ import annotations

import re

from localrl.rewards.rational import MAX_ANSWER, simplify

BOX = "\\boxed"
BOXES_TRIED = 4
THOUGHT_END = "</think>"
GSM8K = "####"

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_ANSWER_IS = re.compile(r"answer\s{0,3}(?:is|:|=)", re.IGNORECASE)
_DECORATION = " \t\r\n:*_`$"

_LETTER = re.compile(r"[\s(\[*_`]*([A-Za-z])[\s)\]*_`.:,]*")
_LETTER_FIRST = re.compile(r"[\s*_`]*(?:\(([A-Za-z])\)|([A-Z])[).:])")
_OPTION = re.compile(r"\s*(?:the )?(?:option|choice) {1,3}\(?([A-Za-z])\b", re.IGNORECASE)
_LETTER_ANYWHERE = re.compile(r"\(([A-Z])\)")


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{...}, with balanced braces; None without one.

    Only the last `BOXES_TRIED` boxes are checked, and `MAX_ANSWER` characters of each.
    """
    place = len(text)
    for _ in range(BOXES_TRIED):
        place = text.rfind(BOX, 0, place)
        if place < 0:
            return None
        content = _braced(text[place + len(BOX) :][:MAX_ANSWER])
        if content is not None:
            return content
    return None


def stated(text: str) -> str | None:
    """The text after an <answer> tag, a `####` or the last "answer is" or "answer:", else None.

    Only text after the last </think> is searched; after `####` and "answer" only one line is taken.
    """
    text = without_thought(text)
    _, tag, tail = text.rpartition("<answer>")
    if tag:
        return tail.partition("</answer>")[0].strip()
    _, marker, tail = text.rpartition(GSM8K)
    if marker:
        return _first_line(tail)
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    return _first_line(text[ends[-1] :]) if ends else None


def last_line(text: str) -> str:
    """The last line that is not empty, after the last </think>."""
    return without_thought(text).strip().rpartition("\n")[2].strip()


def without_thought(text: str) -> str:
    """The text after the last </think>, or all of it if there is none."""
    return text.rpartition(THOUGHT_END)[2]


def as_words(text: str) -> str:
    """Normalise a text for comparison: no case, spaces, quotes or final dot."""
    bare = simplify(text[:MAX_ANSWER].strip(_DECORATION))
    return "".join(bare.split()).strip(".,;\"'*_`").casefold()


def choice(text: str) -> str | None:
    """The multiple-choice letter that this text is or begins with: B, (b), B., B) Paris."""
    text = simplify(text[:MAX_ANSWER])
    alone = _LETTER.fullmatch(text)
    if alone:
        return alone[1].upper()
    first = _LETTER_FIRST.match(text) or _OPTION.match(text)
    return next(filter(None, first.groups())).upper() if first else None


def last_choice(text: str) -> str | None:
    """The letter that the last line is or begins with, else the last (X) in it."""
    line = last_line(text)[-MAX_ANSWER:]
    found = choice(line)
    if found is None:
        anywhere = _LETTER_ANYWHERE.findall(line)
        found = anywhere[-1] if anywhere else None
    return found


def _first_line(text: str) -> str:
    return text.lstrip(_DECORATION).partition("\n")[0].strip()


def _braced(text: str) -> str | None:
    """The content of the braces that a text begins with; None if they do not close."""
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[start + 1 : match.start()]
    return None
