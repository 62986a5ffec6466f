"""Parses numbers as people and models write them, exactly. Plain Python: runs in a child process.

Every function is linear in the length of its text, and sizes are bounded before conversion.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 1000
MAX_EXPONENT = 1000
MAX_ANSWER = 2000
"""Maximum characters in an answer; a longer text is not one."""
MAX_TAIL = 4000

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_SCALED = rf"{_DECIMAL}(?: ?[eE][+-]?[0-9]+)?"
_UNSIGNED = (
    rf"(?:(?P<whole>{_INTEGER}) (?P<part>[0-9]+) ?/ ?(?P<parts>[0-9]+)"
    rf"|(?P<top>{_SCALED})(?: ?/ ?(?P<bottom>[+-]?{_SCALED}))?)"
)
_NUMBER = re.compile(rf" ?(?P<sign>[+-]?) ?{_UNSIGNED}")
_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]}%^])(?<!\^\{)(?P<sign>[+-])|(?<![\w^\\])(?<!\^\{)(?<!\^-)(?<!\^\{-))"
    rf"(?>{_UNSIGNED})(?! ?\^)"
)
_ASSIGNED = re.compile(r"\\?[A-Za-z]\w{0,20} ?= ?")
_UNIT = re.compile(r"[a-zµ][a-zµ/ .'-]{0,39}(?:\^?\{?[23]\}?|[²³])?")

_SPACED_UNITS = re.compile(r"[mgshl]|[a-zµ]{2,}")
_TOUCHING_UNITS = re.compile(
    r"[mcdknµ]m|[mk]?g|[mcd]l|m?s|min|hrs?|sec|ft|in|yd|mi|lbs?|oz|mph|kmh"
)
_NO_UNITS = re.compile(
    r"and|or|to|plus|minus|times|over|x|hundred|thousand|million|billion|trillion"
)
_SAME_UNITS = {"percent": "%", "per cent": "%", "degrees": "°", "degree": "°"}

_REPLACED = (
    ("\\!", ""),
    ("\\,", ""),
    ("\\;", ""),
    ("\\:", ""),
    ("\\ ", " "),
    ("{,}", ","),
    ("\\left", ""),
    ("\\right", ""),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\times", "*"),
    ("\\cdot", "*"),
    ("^\\circ", "°"),
    ("^{\\circ}", "°"),
    ("\\%", "%"),
    ("\\(", ""),
    ("\\)", ""),
    ("\\[", ""),
    ("\\]", ""),
)
_CHARACTERS = str.maketrans(
    {
        "$": None,
        "£": None,
        "€": None,
        "\u2009": None,
        "\u202f": None,
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": "*",
        "\u00bd": " 1/2",
        "\u00bc": " 1/4",
        "\u00be": " 3/4",
        "\u2153": " 1/3",
        "\u2154": " 2/3",
    }
)
_STYLED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit) ?\{([^{}]*)\}")
_FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac ?([0-9]) ?([0-9])")
_TIMES_POWER = re.compile(r"\* ?10 ?\^ ?(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))")
_POWER = re.compile(r"(?<![\w.])10\^(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))")


class Number(NamedTuple):
    """An exact value and the unit written after it, "" for none."""

    value: Fraction
    unit: str = ""

    def agrees(self, other: Number) -> bool:
        """True if the values are equal and the units do not conflict; one may be missing."""
        units = {self.unit, other.unit} - {""}
        return self.value == other.value and len(units) < 2


def simplify(text: str) -> str:
    """Strip LaTeX formatting and currency signs, and collapse white space to single spaces."""
    text = text.replace("\\$", "").translate(_CHARACTERS)
    if "\\" in text or "{,}" in text:
        for old, new in _REPLACED:
            text = text.replace(old, new)
        text = _STYLED.sub(r" \1", text)
        text = _FRACTION.sub(_ratio_text, text)
        text = _SHORT_FRACTION.sub(_ratio_text, text)
    text = " ".join(text.split())
    if "10" in text:
        text = _TIMES_POWER.sub(r"e\1\2", text)
        text = _POWER.sub(r"1e\1\2", text)
    return text


def _ratio_text(match: re.Match[str]) -> str:
    """Write a fraction as a/b, separated from a whole number before it but not from a sign."""
    before = match.string[match.start() - 1 : match.start()]
    gap = "" if before in ("+", "-") else " "
    return f"{gap}{match[1]}/{match[2]}"


def read_number(text: str) -> Number | None:
    """Parse a text that is one number, with or without a unit; None if it is anything else.

    Accepts integers, decimals, thousands with commas, scientific notation (1.5e3, 1.5 x 10^3),
    fractions a/b and \\frac{a}{b}, mixed numbers, %, degrees, currency signs, and a leading `x =`;
    at most `MAX_DIGITS` digits and exponents up to `MAX_EXPONENT`.
    """
    if len(text) > MAX_ANSWER:
        return None
    text = simplify(text.strip(" \t\n*_`")).strip().rstrip(".")
    assigned = _ASSIGNED.match(text)
    text = text[assigned.end() :] if assigned else text
    match = _NUMBER.match(text)
    if match is None:
        return None
    unit = _unit(text[match.end() :])
    value = None if unit is None else _value(match)
    return None if unit is None or value is None else Number(value, unit)


def last_number(text: str) -> Number | None:
    """The last number in the last `MAX_TAIL` characters of a text, without its unit.

    Digits inside a word (x2), exponents and their bases are skipped; powers of ten count.
    """
    found = deque(_IN_TEXT.finditer(simplify(text[-MAX_TAIL:])), maxlen=1)
    value = _value(found[0]) if found else None
    return None if value is None else Number(value)


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["whole"] is not None:
        whole, part = _decimal(match["whole"]), _ratio(match["part"], match["parts"])
        return None if whole is None or part is None else sign * (whole + part)
    value = _ratio(match["top"], match["bottom"] or "1")
    return None if value is None else sign * value


def _ratio(top: str, bottom: str) -> Fraction | None:
    above, below = _decimal(top), _decimal(bottom)
    return None if above is None or not below else above / below


def _decimal(text: str) -> Fraction | None:
    """The value of a decimal with or without an exponent; None if it is too long to convert."""
    digits, _, exponent = text.replace(",", "").replace(" ", "").lower().partition("e")
    if len(digits) > MAX_DIGITS or len(exponent) > 6 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    sign = -1 if digits.startswith("-") else 1
    whole, _, part = digits.lstrip("+-").partition(".")
    power = int(exponent or 0) - len(part)
    value = sign * int(f"{whole}{part}")
    return Fraction(value * 10**power) if power >= 0 else Fraction(value, 10**-power)


def _unit(rest: str) -> str | None:
    """The unit written after a number, "" for none; None if the text is something else."""
    unit = rest.strip(" .").lower()
    if not unit or unit[0] in "%°":
        return unit.replace(" ", "") if len(unit) < 4 else None
    first = re.split(r"[^a-zµ]", unit, maxsplit=1)[0]
    if not _UNIT.fullmatch(unit) or _NO_UNITS.fullmatch(first):
        return None
    known = _SPACED_UNITS if rest.startswith(" ") else _TOUCHING_UNITS
    if not known.fullmatch(first):
        return None
    return _SAME_UNITS.get(unit) or unit.rstrip("s") or unit
