"""Reads the number that a statement gives. Plain Python: runs in a child process.

A number counts only if it stands alone: what is stated but cannot be read as a number, such as
`2*5`, `x > 5` or `not 5`, is no number, and nothing inside it or before it is taken instead.
"""

from __future__ import annotations

import re
from collections import deque
from math import factorial

from localrl.rewards.context import taken_back
from localrl.rewards.notation import MAX_ANSWER, simplify
from localrl.rewards.rational import Number, parse
from localrl.rewards.vocabulary import (
    DENIALS,
    NUMBER_WORDS,
    PLACES,
    REFUSED_BEFORE,
    REFUSED_IN_SUBJECT,
    SUPPOSITIONS,
)

_BOLD = re.compile(r"(?<![\w*)])(\*{1,3}|_{1,3}|`)(?=[^\s*_`])([^*_`]{1,200})(?<=\S)\1(?![\w*(])")
_CLOSING = re.compile(r"(?<=[\w%)}\]\u00b0$€.])(?:\*{1,3}|`|_{1,3})(?=[\s.,;:)]|$)")
_BOLD_END = re.compile(r"(?<=[\w%)}\]$])(\*{1,3}|_{1,3}|`)!(?=\s|$)")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_CUT_BOX = re.compile(r"\\boxed ?\{")

_RETRACTED = re.compile(
    r"\W*(?:no|not|but|or|however|hmm|maybe|perhaps|alternatively|wait|actually|sorry|oops)\b"
    r"|.*\b(?:wait|actually|sorry|oops|correction) ?[,.:!]"
    r"|.*\b(?:is|was|am) (?:wrong|incorrect|mistaken|a mistake)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.;] +(?=[A-Z\"'(])")
_REASON = re.compile(
    r"[,;]? \(?(?:because|since|as(?! (?:an?|the|its|our)(?: [a-z-]+){1,2}\W*$)|which|given that"
    r"|i\.e\.)(?: |$)|, an? "
)
_LEAD = re.compile(
    r"(?:(?:(?:so|thus|therefore|hence|then|simply|just|exactly|precisely|clearly|indeed|obviously"
    r"|now|also|only|equal to|equals|equal|is|are|was|given by|an?|the|final|correct|answer|number"
    r"|value|integer|fraction|total of|in total|about|approximately|around|roughly)(?!\w)"
    r"|\u2248|~|:|=>|=)[ ,:]*)+",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"(?:[A-Za-z][A-Za-z'-]* ){1,10}?"
    r"(?:is|are|was|were|equals|has|have|had|[a-z]+ed|sold|bought|spent|made|got|paid|took"
    r"|costs?|makes?|takes?|needs?|gets?|earns?) (?=[-+0-9.$€£])"
)
_NAME = re.compile(r"\\?[^\W\d_]\w{0,20}'?(?:_\{?\w{1,9}\}?)?|[A-Za-z]\([^()]{1,20}\)")
_ARITHMETIC = re.compile(r"[0-9+\-*/() .,%$€£\u00f7^{}²³!\u221a]*")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+[,.]?")
_EQUAL_FACTORIAL = re.compile(r"(?<![\w.])([0-9]{1,2})!=([0-9]{1,99})(?![\w.]\w)")
_NEGATED = re.compile(
    r"(?<![\w)\]}])(?<![0-9)\]}] )(?<!\b[A-Za-z] )- ?\(([0-9.]+ ?/ ?[0-9.]+)\)(?! ?[\w(^/*])"
)
_WORD_AND_NUMBER = re.compile(r"\b([A-Za-z]{3,9}) \(([0-9]{1,3})\)")
_DOUBTS = DENIALS | SUPPOSITIONS


def read_statement(text: str) -> Number | None:
    """The number that a statement is, perhaps in a few words; None if it is anything else.

    Read are: a number with its unit; words such as "therefore" or "a total of" before it; a
    sentence that ends in "is 5 apples"; the right side of an equation whose left side is a name
    or plain arithmetic. A reason may follow, or other sentences that do not take it back.
    """
    if len(text) > MAX_ANSWER:
        return None
    line = with_spaces(simplify(undecorated(text)))
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
    left, sign, right = body.rpartition("=")
    if sign:
        return parse(right.strip()) if equals(left, whole=True) else None
    return _of_sentence(body)


def undecorated(text: str) -> str:
    """Drop the signs of bold text, italics and code, and a box that was cut off."""
    text = _CALCULATOR.sub("", text)  # GSM8K's notes: 48/2 = <<48/2=24>>24
    text = _BOLD_END.sub(r"\1.", text)  # **5**! is no factorial
    return _CUT_BOX.sub(" ", _CLOSING.sub("", _BOLD.sub(r"\2", text.strip())))


def _clause(line: str) -> str | None:
    """The first sentence of a statement without its reason; None if what follows takes it back."""
    ends = [found for pattern in (_SENTENCE, _REASON) if (found := pattern.search(line))]
    if not ends:
        return line.rstrip(" .,;") if not line.endswith("..") else line
    end = min(ends, key=re.Match.start)
    rest = line[end.end() :]
    return None if _RETRACTED.match(rest) or taken_back(rest) else line[: end.start()]


def _of_sentence(clause: str) -> Number | None:
    subject = _SUBJECT.match(clause)
    if subject is None or REFUSED_IN_SUBJECT & {*re.split(r"[ '-]", subject[0].lower())}:
        return None
    return None if "n't" in subject[0] else parse(clause[subject.end() :])


def equals(left: str, *, whole: bool = False) -> bool:
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
    word = side[-1].lower() if side else ""
    if word in PLACES or word in REFUSED_BEFORE or (word in _DOUBTS and not whole):
        return False
    if whole and (_DOUBTS | {"given", "where"}) & {*re.findall(r"[a-z']+", left.lower())}:
        return False
    return bool(_NAME.fullmatch(term) or _ARITHMETIC.fullmatch(term))


def with_spaces(line: str) -> str:
    """Write `5!=120` as `5! =120` where that is so, `five (5)` as `5` and `-(1/2)` as `-1/2`."""
    line = _NEGATED.sub(r"-\1", line)
    return _as_number(_factorial(line))


def _factorial(line: str) -> str:
    """Write 5!=120 with a space, if that is so: it is no inequality then."""
    return _EQUAL_FACTORIAL.sub(
        lambda found: (
            f"{found[1]}! ={found[2]}" if str(factorial(int(found[1]))) == found[2] else found[0]
        ),
        line,
    )


def _as_number(line: str) -> str:
    """Write five (5) as 5."""
    return _WORD_AND_NUMBER.sub(
        lambda found: found[2] if str(NUMBER_WORDS.get(found[1].lower())) == found[2] else found[0],
        line,
    )
