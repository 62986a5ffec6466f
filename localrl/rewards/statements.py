"""Reads the number that a statement gives, or that a text ends with. Plain Python.

A number counts only if it stands alone: what is stated but cannot be read as a number, such as
`2*5`, `x > 5` or `not 5`, is no number, and nothing inside it or before it is taken instead.
"""

from __future__ import annotations

import re
from collections import deque

from localrl.rewards.measures import known_unit, read_unit
from localrl.rewards.notation import CURRENCIES, MAX_ANSWER, plain, simplify
from localrl.rewards.rational import UNSIGNED, Number, parse, value_of
from localrl.rewards.vocabulary import AMOUNTS, CHANGES, REFUSED_BEFORE, REFUSED_IN_SUBJECT

MAX_TAIL = 4000
"""Characters at the end of a text in which its last number is looked for."""
NEAR = 80
"""Characters before and after a number that decide if it stands alone."""

_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]}%^])(?<!\^\{)(?P<sign>[+-])|(?<![\w^\\])(?<!\^\{)(?<!\^-)(?<!\^\{-))"
    rf"(?>{UNSIGNED})(?! ?\^|[²³\u2070-\u2079])"
)
_BOLD = re.compile(r"(?<![\w*)])(\*{1,3}|_{1,3}|`)(?=[^\s*_`])([^*_`]{1,200})(?<=\S)\1(?![\w*(])")
_CLOSING = re.compile(r"(?<=[\w%)}\]\u00b0$€.])(?:\*{1,3}|`|_{1,3})(?=[\s.,;:)]|$)")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_CUT_BOX = re.compile(r"\\boxed ?\{")

_RETRACTED = re.compile(
    r"\W*(?:no|not|but|or|however|hmm|maybe|perhaps|alternatively)\b"
    r"|.*\b(?:wait|actually|wrong|incorrect|mistaken?|oops|sorry|correction|instead)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.;] +(?=[A-Z\"'(])")
_REASON = re.compile(r"[,;]? \(?(?:because|since|as|which|given that|i\.e\.)(?: |$)|, an? ")
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|simply|just|exactly|precisely|clearly|indeed|obviously"
    r"|now|also|only|equal to|equals|equal|is|are|was|given by|an?|the|final|correct|answer|number"
    r"|value|integer|fraction|total of|in total|about|approximately|around|roughly|\u2248|~|:|=>|=)"
    r"(?![A-Za-z])[ ,:]*)+",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"(?:[A-Za-z][A-Za-z'-]* ){1,10}?"
    r"(?:is|are|was|were|equals|has|have|had|[a-z]+ed|sold|bought|spent|made|got|paid|took"
    r"|costs?|makes?|takes?|needs?|gets?|earns?) (?=[-+0-9.$€£])"
)
_NAME = re.compile(r"\\?[A-Za-z]\w{0,20}'?(?:_\{?\w{1,9}\}?)?|[A-Za-z]\([^()]{1,20}\)")
_ARITHMETIC = re.compile(r"[0-9+\-*/() .,%$€£\u00f7^{}²³!\u221a]*")
_TOUCHING = re.compile(r"[A-Za-zµ]+(?:/[a-z]+)?[²³]?")
_REFUSED_AFTER = re.compile(
    r"(?:[a-z]+ )?than\b|at (?:the )?(?:least|most)\b"
    r"|(?:is|was) (?:[a-z]+ )?(?:not|wrong|incorrect)\b|(?:is|was)n't\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+[,.]?")
_RATIO = re.compile(r"(?:[0-9%)] (?:to|in|per|for every)|\bup to|or equal to)$|\\[A-Za-z]+$")
_LIST = re.compile(r"(?:[0-9%)\u221e\u2026]|\.\.|dots) ?(?:,|;|,? and|,? or)$")


def read_statement(text: str) -> Number | None:
    """The number that a statement is, perhaps in a few words; None if it is anything else.

    Read are: a number with its unit; words such as "therefore" or "a total of" before it; a
    sentence that ends in "is 5 apples"; the right side of an equation whose left side is a name
    or plain arithmetic. A reason may follow, or other sentences that do not take it back.
    """
    if len(text) > MAX_ANSWER:
        return None
    line = simplify(_undecorated(text))
    number = parse(line)
    if number is not None:
        return number
    clause = _clause(line)
    if clause is None:
        return None
    lead = _LEAD.match(clause)
    body = clause[lead.end() :] if lead else clause
    number = parse(body)
    if number is not None or not body:
        return number
    left, equals, right = body.rpartition("=")
    if equals:
        return parse(right.strip()) if _equals(left, whole=True) else None
    return _of_sentence(body)


def last_number(text: str) -> Number | None:
    """The last number in the last `MAX_TAIL` characters of a text, with its unit if it is known.

    Digits inside a word (x2), exponents and their bases are skipped; powers of ten count. None if
    the last number is a part of something else: of a sum, a list, a range, or "not 5".
    """
    for line in reversed(plain(_undecorated(text[-MAX_TAIL:])).split("\n")):
        line = " ".join(line.split())
        found = deque(_IN_TEXT.finditer(line), maxlen=1)
        if found:
            return parse(line) or _alone(found[0])
    return None


def _undecorated(text: str) -> str:
    """Drop the signs of bold text, italics and code, and a box that was cut off."""
    text = _CALCULATOR.sub("", text)  # GSM8K's notes: 48/2 = <<48/2=24>>24
    return _CUT_BOX.sub(" ", _CLOSING.sub("", _BOLD.sub(r"\2", text.strip())))


def _clause(line: str) -> str | None:
    """The first sentence of a statement without its reason; None if what follows takes it back."""
    ends = [found for pattern in (_SENTENCE, _REASON) if (found := pattern.search(line))]
    if not ends:
        return line.rstrip(" .,;") if not line.endswith("..") else line
    end = min(ends, key=re.Match.start)
    return None if _RETRACTED.match(line[end.end() :]) else line[: end.start()]


def _of_sentence(clause: str) -> Number | None:
    subject = _SUBJECT.match(clause)
    if subject is None or REFUSED_IN_SUBJECT & {*re.split(r"[ '-]", subject[0].lower())}:
        return None
    return None if "n't" in subject[0] else parse(clause[subject.end() :])


def _alone(match: re.Match[str]) -> Number | None:
    line, sign = match.string, match["sign"]
    before, after = line[max(match.start() - NEAR, 0) : match.start()], line[match.end() :][:NEAR]
    currency = before[-1:] if before[-1:] and before[-1:] in CURRENCIES else ""
    if currency:
        before = before[:-1]
        if before[-2:] in ("-", " -"):
            before, sign = before[:-1], "-"
    if match["top"] and match["top"][0] == "(":
        before += "("
    if not (_free_before(before, after) and _free_after(after)):
        return None
    value = value_of(match)
    unit = known_unit(after, currency)
    return None if value is None else Number(-value if sign == "-" else value, unit)


def _free_before(before: str, after: str) -> bool:
    """True if what stands before a number leaves it what it is."""
    text = before.rstrip()
    if not text:
        return True
    if _LIST.search(text) and not re.match(r" ?[A-Za-z%$€]{2}", after):
        return False
    last, touching = text[-1], text == before
    if last.isalpha() or last == "'":
        return not _RATIO.search(text) and _word_before(text)
    if last == "=":
        return _equals(text[:-1])
    if last in "-+":
        return text == "-"  # a list's item
    if last == "(":
        return not re.search(r"[\w)\]}'\u221a^]\($", text) and _word_before(text[:-1].rstrip())
    if last == ">":
        return text == ">" or text[-2:] in ("=>", "->")
    if last in ".:)]?~" and touching:
        return last in ":~" and not text[-2:-1].isdigit()
    return last in ",;:.?\"'\u2014\u201c\u201d\u2026\u2192\u2248#)]~&"


def _word_before(text: str) -> bool:
    words = re.findall(r"[A-Za-z'/]+", re.split(r"[^A-Za-z'/ -]", text)[-1].lower())[-4:]
    if not words:
        return True
    last = words[-1]
    if (len(last) == 1 and last not in ("a", "i")) or last in REFUSED_BEFORE:
        return False
    if "not" in words or any(word.endswith("n't") for word in words) or last == "no":
        return False
    return last != "of" or (len(words) > 1 and words[-2] in AMOUNTS)


def _equals(left: str, *, whole: bool = False) -> bool:
    """True if the number after `left =` is what the left side is worth.

    whole: True if the left side may be no list of equations, as in a statement.
    """
    if left[-1:] and left[-1:] in "!<>\u2260~":
        return False
    left = left.rstrip()
    if whole and re.search(r",(?![0-9]{3})|;|\b(?:or|and|not)\b|[<>\u2260\u2264\u2265]", left):
        return False
    if re.search(r"=[^=]*(?:,(?![0-9]{3})|;|\b(?:or|and)\b)[^=]*$", left):
        return False  # x = 3 or x = 5
    side = re.split(r"[,;:=](?![0-9])", left)[-1].split()
    taken: deque[str] = deque()
    while side and not _WORD.fullmatch(side[-1]):
        taken.appendleft(side.pop())
    term = " ".join(taken)
    if side and not term and not _word_before(side[-1]):
        return False
    return bool(_NAME.fullmatch(term) or _ARITHMETIC.fullmatch(term))


def _free_after(after: str) -> bool:
    """True if what follows a number leaves it what it is."""
    text = after.lstrip()
    if not text:
        return True
    first, touching = text[0], text == after
    if first.isalpha():
        return _word_after(text, touching)
    if first in ".,:":
        return not (touching and text[1:2].isdigit()) and not text.startswith("..")
    if first == "/":
        return bool(known_unit(text))
    if first == "-":
        return re.match(r"- ?(?!fold)[A-Za-z]{2}", text) is not None
    if first == "(":
        return not touching and re.match(r"\([A-Za-z]{2}", text) is not None
    if first in "%°":
        return _free_after(re.sub(r"^[%°](?: ?[CF]\b)?", "", text))
    return first in ";\"'\u2014\u201d)]$€£¥₹&#"


def _word_after(text: str, touching: bool) -> bool:
    unit = _TOUCHING.match(text)
    if touching:
        return unit is not None and read_unit(unit[0]) is not None
    if _REFUSED_AFTER.match(text):
        return False
    word = re.split(r"[^A-Za-z']", text, maxsplit=1)[0]
    known = len(word) > 1 or word in ("a", "m", "g", "s", "h", "l", "L")
    return known and (word.lower() not in CHANGES or text.lower().startswith("or so"))
