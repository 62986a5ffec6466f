"""Reads the unit after a number, so that 5 kg, 5 kilograms and 5 cm can be compared.

A unit is known, such as km/h, or it is a noun: apples. Plain Python: runs in a child process.
"""

from __future__ import annotations

import re

from localrl.rewards.vocabulary import NO_NOUNS

LONGEST = 120
"""Maximum characters in a unit."""

_NAMES = {
    "nm": "nanometer nanometers nanometre nanometres",
    "µm": "micrometer micrometers micrometre micrometres um",
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "dm": "decimeter decimeters decimetre decimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms kilo kilos kgs",
    "tonne": "tonnes",
    "lb": "lbs",
    "pound": "pounds",
    "£": "gbp quid",
    "oz": "ounce ounces",
    "ml": "milliliter milliliters millilitre millilitres",
    "cl": "centiliter centiliters centilitre centilitres",
    "dl": "deciliter deciliters decilitre decilitres",
    "l": "liter liters litre litres",
    "gallon": "gallons gal",
    "ms": "millisecond milliseconds",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "$": "dollar dollars usd buck bucks",
    "€": "euro euros eur",
    "cent": "cents ¢",
    "¥": "yen jpy",
    "₹": "rupee rupees inr",
    "%": "percent pct",
    "°": "degree degrees deg",
    "°C": "celsius °c",
    "°F": "fahrenheit °f",
    "rad": "radian radians",
    "megam": "megameter megameters megametre megametres",
    "megag": "megagram megagrams",
    "hz": "hertz",
    "am": "",
    "pm": "",
}
_SCALED = {
    "w": "watt",
    "wh": "watthour",
    "j": "joule",
    "hz": "hertz",
    "pa": "pascal",
    "byte": "byte",
    "bit": "bit",
}
_PREFIXES = {"k": "kilo", "mega": "mega", "m": "milli", "g": "giga", "t": "tera"}
_NAMES |= {name: f"{name}s" for name in _SCALED.values() if name != "hertz"}
_NAMES |= {
    f"{sign}{unit}": f"{prefix}{name} {prefix}{name}s"
    for unit, name in _SCALED.items()
    for sign, prefix in _PREFIXES.items()
}
_KNOWN = {name: unit for unit, names in _NAMES.items() for name in (unit.lower(), *names.split())}
"""Every name of a unit, and how it is written when compared."""
_FORMS = "|".join(map(re.escape, sorted(_KNOWN, key=len, reverse=True)))
_ONE = (
    rf"(?:(square|sq|cubic|cu)\.? )?({_FORMS})(?![a-zµ'])"
    r"(?:(?:\^ ?)?\{?([23])\}?|([²³]))?"
)
_PART = re.compile(_ONE)
_MEASURE = re.compile(rf"(?:{_ONE})?(?: ?(?:/|\bper) ?{_ONE})*")
_BITS = re.compile(r"\b([kKMGT])([Bb])(?=[/\s.]|$)")
_MEGA = re.compile(r"\bM(?=(?:W|Wh|J|Hz|Pa|byte|bit|m|g)\b)")
_ALONE = re.compile(r"(?<![A-Za-z])[WJ](?![A-Za-z])")
"""Capitals that tell one unit from another: MW, mW; MB, Mb."""
_SPELLINGS = (
    (re.compile(r"\bwatt[ -]hour"), "watthour"),
    (re.compile(r"\b((?:kilo|mega|giga|milli)watt)[ -]hour"), "\\1hour"),
    (re.compile(r"(?:\u00b0|degrees?) ?([cf])(?:elsius|ahrenheit)?\b"), "\u00b0\\1"),
    (re.compile(r"\bper cent\b"), "percent"),
    (re.compile(r"\bmph\b"), "mi/h"),
    (re.compile(r"\b(?:kmph|kmh|kph)\b"), "km/h"),
)
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3", "²": "^2", "³": "^3"}
_APART = frozenset(["m", "l", "h", "in", "am", "pm"])
"""Units that are read only after a space: 5m is more often five times m."""
_LARGE = re.compile(r"[MKBTG]\b")
"""Capitals that alone stand for millions and the like."""

_ALTOGETHER = re.compile(
    r"(?:in total|in all|altogether|total|overall|left|remaining|more|short)\b ?"
)
_WORDS = re.compile(r"[a-z'-]{2,}(?: [a-z'-]+)*")
_NOUNS = re.compile(r"[a-z](?=[a-z'-]*[aeiouy])[a-z'-]{2,}(?: [a-z][a-z'-]*)*")
_SHARED = re.compile(r"(?:each|apiece|for (?:each|every))\b")
_OF_A_NUMBER = re.compile(r"of (?:[a-z]\b|[0-9])")

_PLURAL = re.compile(r"(?!always|perhaps|across|besides|less|plus)[a-z]{3,}s\b")


def read_unit(rest: str, currency: str = "") -> str | None:
    """The unit in the text after a number, "" for none; None if the text is anything else.

    currency: the sign before the number, which is its unit if the text has no other.
    """
    text = rest if rest.endswith("..") else rest.rstrip(" ").removesuffix(".")
    if len(text) > LONGEST or _LARGE.match(text.lstrip()):
        return None
    apart, text = text[:1] == " ", _lower(text.strip())
    while found := _ALTOGETHER.match(text):
        apart, text = True, text[found.end() :]
    unit, words = _measure(text)
    if unit in _APART and not (apart and (unit != "in" or not words)):
        return None
    if (words and not (unit or apart)) or NO_NOUNS & {*re.split("[ '-]", words)}:
        return None
    if "n't" in words or _SHARED.match(words):
        return None
    if unit == "%" and _OF_A_NUMBER.match(words):
        return None
    if words and not (_WORDS if unit else _NOUNS).fullmatch(words):
        return None
    unit = unit or " ".join(word.rstrip("s") for word in words.split())
    if currency:
        sign = _KNOWN.get(currency, currency)
        return f"{sign} {unit}" if unit.startswith("per ") else sign
    return unit


def known_unit(rest: str, currency: str = "") -> str:
    """The known unit, or the noun in the plural, with which a sentence goes on after a number."""
    text = _lower(rest[:LONGEST].strip())
    unit, _ = _measure(text)
    if not unit and rest.startswith(" "):
        noun = _PLURAL.match(text)
        unit = noun[0] if noun and noun[0] not in NO_NOUNS else ""
    return read_unit(unit and f" {unit}", currency) or ""


def agree(one: str, other: str) -> bool:
    """True if two units do not conflict: one is missing, or they are the same.

    Nouns are the same if one only says more: apples, red apples.
    """
    if not one or not other or one == other:
        return True
    if "pound" in (one, other) and {one, other} & {"lb", "£"}:
        return True
    if _measure(_lower(one))[0] or _measure(_lower(other))[0]:
        return False
    words, others = set(one.split()), set(other.split())
    return ("per" in words) == ("per" in others) and (words <= others or words >= others)


def _lower(text: str) -> str:
    if not text.islower():
        text = _MEGA.sub("mega", _BITS.sub(_bits, text))
        text = _ALONE.sub(lambda found: _SCALED[found[0].lower()], text).lower()
    for spelling, unit in _SPELLINGS:
        text = spelling.sub(unit, text)
    return text


def _bits(found: re.Match[str]) -> str:
    return f"{found[1]}{'byte' if found[2] == 'B' else 'bit'}"


def _measure(text: str) -> tuple[str, str]:
    """The known unit that a text begins with, as it is compared, and the words after it."""
    found = _MEASURE.match(text)
    end = found.end() if found else 0
    units = [
        f"{_KNOWN[name]}{_power(before, power, sign)}"
        for before, name, power, sign in _PART.findall(text[:end])
    ]
    per = "per " if units and text.startswith(("/", "per ")) else ""
    return per + " per ".join(units), text[end:].strip()


def _power(*signs: str) -> str:
    """The power of a unit, as in m^2, from what is written before or after it."""
    sign = next(filter(None, signs), "")
    return _POWERS.get(sign, f"^{sign}" if sign else "")
