"""Finds the answer that a completion states. Plain Python, linear in the length of the text."""

from __future__ import annotations

import re

from localrl.rewards.context import denied_around, taken_back
from localrl.rewards.notation import MAX_ANSWER

BOXES = ("\\boxed", "\\fbox")
BOXES_TRIED = 4
THOUGHT_END = "</think>"
GSM8K = "####"

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_ANSWER_IS = re.compile(
    r"answer[\s*_`\"]{0,4}"
    r"(?:is\b(?! (?:correct|right|reasonable|valid|verified|consistent)\b)|:|=)",
    re.IGNORECASE,
)
_DECORATION = re.compile(r"(?:[\s:*_`]|\$\$?(?=\s)|\\[\[(])*")
_HEADING = re.compile(r"[\s*_]*(?:(?:the )?final )?answer[\s*_:]*\n", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{...} or \\fbox{...}; None without one.

    Braces in it are balanced. Only the last `BOXES_TRIED` boxes are checked, and `MAX_ANSWER`
    characters of each.
    """
    found = _last_box(text)
    return None if found is None else text[found[1] : found[2]]


def boxed_answer(text: str) -> str | None:
    """The content of the last box, as `last_boxed` finds it; empty if the text denies it.

    It does in "not \\boxed{5}", "\\boxed{5} is wrong" and the like.
    """
    found = _last_box(text)
    if found is None:
        return None
    box, start, end = found
    return "" if denied_around(text[:box], text[end + 1 :]) else text[start:end]


def _last_box(text: str) -> tuple[int, int, int] | None:
    """Return where the last closed box begins, and where its content begins and ends."""
    place = len(text)
    for _ in range(BOXES_TRIED):
        place, box = max((text.rfind(box, 0, place), box) for box in BOXES)
        if place < 0:
            return None
        start = place + len(box)
        content = _braced(text[start:][:MAX_ANSWER])
        if content is not None:
            return place, text.index("{", start) + 1, text.index("{", start) + 1 + len(content)
    return None


def stated(text: str) -> str | None:
    """The text after an <answer> tag, a `####` or the last "answer is" or "answer:", else None.

    Only text after the last </think> is searched; after `####` and "answer" only one line is
    taken, or the next one if that ends with a colon. It is empty if what follows takes it back.
    """
    text = without_thought(text)
    _, tag, tail = text.rpartition("<answer>")
    if tag:
        return tail.partition("</answer>")[0].strip()
    _, marker, tail = text.rpartition(GSM8K)
    if marker:
        heading = _HEADING.match(tail)
        return _first_line(tail[heading.end() :] if heading else tail)
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    return _first_line(text[ends[-1] :]) if ends else None


def last_line(text: str) -> str:
    """The last line that is not empty, after the last </think>."""
    return without_thought(text).strip().rpartition("\n")[2].strip()


def without_thought(text: str) -> str:
    """The text after the last </think>, or all of it if there is none."""
    return text.rpartition(THOUGHT_END)[2]


def _first_line(text: str) -> str:
    line, _, rest = _undecorated(text).partition("\n")
    if line.rstrip(" *_").endswith(":"):
        line, _, rest = _undecorated(rest).partition("\n")
    if rest.strip() and taken_back(rest):
        return ""
    return line.strip()


def _undecorated(text: str) -> str:
    found = _DECORATION.match(text)
    return text[found.end() :] if found else text


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
