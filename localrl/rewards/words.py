"""Compares answers that are neither numbers nor letters: words, terms, sets, intervals."""

from __future__ import annotations

import re
from fractions import Fraction

from localrl.rewards.notation import CURRENCIES, MAX_ANSWER, simplify
from localrl.rewards.rational import parse

DEPTH = 3
"""Sets and tuples inside others are compared as such down to this depth."""

_DECORATION = " \t\r\n:*_`$"
_PI = re.compile(r"(?<![a-z])pi(?![a-z])")
_FACTOR = re.compile(r"(?<=[0-9)])\*(?=[a-z\u03c0\u221a(])")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9]) (?=[0-9])")
_SINGLE = re.compile(r"([\^_])\{(\w)\}")
_BRACKETS = re.compile(r"[()\[\]{},]")
_SIGNS = {"\u2265": ">=", "\u2264": "<=", "\u2260": "!=", "\u2205": "{}", "\u00b5": "\u03bc"}
_SYMBOL = r"(?:[a-z\u03b1-\u03c9]|\u221a(?:\[\d\])?\([0-9a-z]{1,20}\))"
_OVER = re.compile(rf"(?P<open>\()?([0-9]{{0,50}})({_SYMBOL})(?(open)\))/([0-9]{{1,50}})")
_TIMES = re.compile(rf"\(([0-9]{{1,50}})/([0-9]{{1,50}})\)\*?({_SYMBOL})")
_NUMBER = re.compile(r"[-+]?[0-9./()e+-]+")


def as_words(text: str) -> str:
    """Normalise a text for comparison: no case, spaces, quotes, LaTeX formatting or final dot.

    The elements of sets, tuples and intervals are compared as numbers where they are numbers, and
    those of sets in any order.
    """
    bare = simplify(text[:MAX_ANSWER].strip(_DECORATION))
    bare = bare.replace("\\{", "{").replace("\\}", "}").casefold()
    bare = bare.translate(str.maketrans(_SIGNS))
    bare = _PI.sub("\u03c0", bare.translate(dict.fromkeys(map(ord, CURRENCIES))))
    bare = _BETWEEN_DIGITS.sub("_", bare)  # 1 2 is not 12
    bare = _FACTOR.sub("", "".join(bare.split()).strip(".,;\"'*_`"))
    return _elements(_SINGLE.sub(r"\1\2", bare), DEPTH)


def _elements(text: str, depth: int) -> str:
    """The text with the elements of a set or tuple in one form, sets sorted."""
    if depth == 0 or text[:1] not in ("(", "[", "{") or text[-1:] not in (")", "]", "}"):
        return _value(text)
    if (text[0] == "{") != (text[-1] == "}"):
        return text
    parts = _split(text[1:-1])
    if parts is None or (len(parts) == 1 and text[0] != "{"):
        return _value(text)
    forms = [_elements(part, depth - 1) for part in parts]
    if text[0] == "{":
        forms = sorted(set(forms))
    return f"{text[0]}{','.join(forms)}{text[-1]}"


def _split(text: str) -> list[str] | None:
    """Split at commas outside of brackets; None if the brackets do not match."""
    parts, depth, start = [], 0, 0
    for match in _BRACKETS.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth < 0:
            return None
        if match[0] == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]] if depth == 0 else None


def _value(text: str) -> str:
    number = parse(text) if _NUMBER.fullmatch(text) else None
    return _multiple(text) if number is None else str(number.value)


def _multiple(text: str) -> str:
    """A rational multiple of one letter or root in one form: 2π/3 and (2/3)π are (2/3)π."""
    sign = "-" if text.startswith("-") else ""
    over = _OVER.fullmatch(text, len(sign))
    times = _TIMES.fullmatch(text, len(sign))
    if over:
        top, symbol, bottom = over[2] or "1", over[3], over[4]
    elif times:
        top, bottom, symbol = times.groups()
    else:
        return text
    return text if not int(bottom) else f"{sign}({Fraction(int(top), int(bottom))}){symbol}"
