"""Parses numbers as people and models write them, exactly. Plain Python: runs in a child process.

Every function is linear in the length of its text, and sizes are bounded before conversion.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from localrl.rewards.measures import agree, read_unit
from localrl.rewards.notation import CURRENCIES, MAX_ANSWER, simplify

MAX_DIGITS = 1000
MAX_EXPONENT = 1000

_GROUPS = "|".join(rf"(?:{mark}[0-9]{{3}})+" for mark in (",", " ", "'"))
_INTEGER = rf"(?:[0-9]{{1,3}}(?:{_GROUPS})(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_EXPONENT = r"(?: ?[eE][+-]?[0-9]+)?"
_SCALED = rf"{_DECIMAL}{_EXPONENT}"
_BRACKETED = rf"\( ?[+-]? ?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+){_EXPONENT} ?\)"  # (1,200) is a pair
UNSIGNED = (
    r"(?:(?P<whole>[0-9]+) (?P<part>[1-9][0-9]*) ?/ ?(?P<parts>[0-9]+)(?!\.?[0-9])"
    rf"|(?P<top>{_SCALED}|{_BRACKETED})(?: ?/ ?(?P<bottom>[+-]?{_SCALED}|{_BRACKETED}))?)"
)
"""Pattern of a number without a sign; `value_of` takes a match of it."""
_NUMBER = re.compile(
    rf" ?(?P<sign>[+-]?) ?(?P<currency>[{CURRENCIES}]?) ?(?P<minus>-?)(?>{UNSIGNED})"
)
_ASSIGNED = re.compile(r"\\?[^\W\d_]\w{0,20} ?= ?")


class Number(NamedTuple):
    """An exact value and the unit written with it, "" for none."""

    value: Fraction
    unit: str = ""

    def agrees(self, other: Number) -> bool:
        """True if the values are equal and the units do not conflict; one may be missing."""
        return self.value == other.value and agree(self.unit, other.unit)


def read_number(text: str) -> Number | None:
    """Parse a text that is one number, with or without a unit; None if it is anything else.

    Accepts integers, decimals, thousands with commas or spaces, scientific notation (1.5e3,
    1.5 x 10^3), fractions a/b and \\frac{a}{b}, mixed numbers, %, degrees, currencies, a pair of
    brackets, digits of other scripts, and a leading `x =`; at most `MAX_DIGITS` digits and
    exponents up to `MAX_EXPONENT`.
    """
    if len(text) > MAX_ANSWER:
        return None
    return parse(simplify(text.strip(" \t\n*_`")).strip())


def parse(text: str) -> Number | None:
    """`read_number` of a text that is simplified already."""
    assigned = _ASSIGNED.match(text)
    text = text[assigned.end() :] if assigned else text
    if text[:1] == "-" and (inner := _unbracketed(text[1:].lstrip())) is not None:
        number = parse(inner) if inner[:1].isdigit() else None
        if number is not None:
            return number._replace(value=-number.value)
    inner = _unbracketed(text)
    match = _NUMBER.match(text if inner is None else inner)
    if match is None or (match["sign"] and match["minus"]):
        return None
    rest = match.string[match.end() :]
    unit = read_unit(rest, match["currency"]) if inner is None or not rest else None
    value = None if unit is None else value_of(match)
    if unit is None or value is None:
        return None
    return Number(-value if match["sign"] == "-" or match["minus"] else value, unit)


def value_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `UNSIGNED`; None if it has none, or is too long to convert."""
    if match["whole"] is not None:
        whole, part = _decimal(match["whole"]), _ratio(match["part"], match["parts"])
        grouped = len(match["part"]) == 3 and part is not None and part >= 1  # 1 500/2
        return None if whole is None or part is None or grouped else whole + part
    return _ratio(match["top"], match["bottom"] or "1")


def exact(text: str) -> Fraction | None:
    """The value of a plain decimal such as -1.5e3; None if it is too long to convert."""
    return _decimal(text)


def _unbracketed(text: str) -> str | None:
    """The text inside a pair of brackets that encloses all of it; None without one."""
    if text[:1] + text[-1:] not in ("()", "{}"):
        return None
    inner = text[1:-1].strip()
    return None if any(sign in inner for sign in "(){},\\") else inner


def _ratio(top: str, bottom: str) -> Fraction | None:
    above, below = _decimal(top), _decimal(bottom)
    return None if above is None or not below else above / below


def _decimal(text: str) -> Fraction | None:
    """The value of a decimal with or without an exponent; None if it is too long to convert."""
    for mark in ", '()":
        text = text.replace(mark, "")
    digits, _, exponent = text.lower().partition("e")
    if len(digits) > MAX_DIGITS or len(exponent) > 6 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    sign = -1 if digits.startswith("-") else 1
    whole, _, part = digits.lstrip("+-").partition(".")
    power = int(exponent or 0) - len(part)
    value = sign * int(f"{whole}{part}")
    return Fraction(value * 10**power) if power >= 0 else Fraction(value, 10**-power)
