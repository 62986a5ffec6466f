"""Reads the number that a statement gives, or that a text ends with. Plain Python.

A number counts only if it stands alone: what is stated but cannot be read as a number, such as
`2*5`, `x > 5` or `not 5`, is no number, and nothing inside it or before it is taken instead.
"""

from __future__ import annotations

import re
from collections import deque
from math import factorial

from localrl.rewards.context import clause_before, doubtful, taken_back
from localrl.rewards.measures import known_unit, read_unit
from localrl.rewards.notation import CURRENCIES, MAX_ANSWER, plain, simplify
from localrl.rewards.rational import UNSIGNED, Number, parse, value_of
from localrl.rewards.vocabulary import (
    AMOUNTS,
    DENIALS,
    DOERS,
    LABELS,
    LEFT_WITH,
    NOT_AFTER,
    NOT_BEHIND,
    NUMBER_WORDS,
    PLACED,
    PLACES,
    REFUSED_BEFORE,
    REFUSED_IN_SUBJECT,
    SUPPOSITIONS,
    TELLS,
    TOLD_TO,
)

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
_TOUCHING = re.compile(r"[A-Za-zµ]+(?:/[a-z]+)?[²³]?")
_REFUSED_AFTER = re.compile(
    r"(?:[a-z]+ )?than\b|at (?:the )?(?:least|most)\b"
    r"|(?:is|was) (?:[a-z]+ )?(?:not|wrong|incorrect)\b|(?:is|was)n't\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+[,.]?")
_EQUAL_FACTORIAL = re.compile(r"(?<![\w.])([0-9]{1,2})!=([0-9]{1,99})(?![\w.]\w)")
_WORD_AND_NUMBER = re.compile(r"\b([A-Za-z]{3,9}) \(([0-9]{1,3})\)")
_MARKS = ',;:.?"\u2014\u201c\u201d\u2026\u2248#)]~'
_NEVER = REFUSED_BEFORE | LABELS
_DOUBTS = DENIALS | SUPPOSITIONS
_OTHER = re.compile(
    r"(?:\b(?:is|are|was|were|has|have|had|gets?|equals?)|=) [$€£]?-?[0-9][^;]{0,200}?"
    r"(?:,|\b(?:and|while|whereas|but)\b|&)(?![0-9])"
    r"(?![^;]*\b(?:so|thus|therefore|hence|then|gives?|giving|makes?|making|leaving|leaves?|left"
    r"|total|together|altogether|which|that|because|since|get|sum|result|answer|need|needs)\b)"
    r"|\b(?:" + "|".join(NUMBER_WORDS) + r") (?:and|or|to|plus|minus|times)$",
    re.IGNORECASE,
)
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
    line = _as_number(_factorial(simplify(_undecorated(text))))
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
    lines = plain(_undecorated(text[-MAX_TAIL:])).split("\n")
    rest = ""
    for line in reversed(lines):
        line = _as_number(_factorial(" ".join(line.split())))
        found = deque(_IN_TEXT.finditer(line), maxlen=1)
        if found:
            if rest.strip() and taken_back(rest):
                return None
            return parse(line) or _alone(found[0])
        rest = f"{line}\n{rest}"[:MAX_ANSWER]
    return None


def _undecorated(text: str) -> str:
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


def _alone(match: re.Match[str]) -> Number | None:
    line, sign = match.string, match["sign"]
    end = match.end() - match[0].endswith(".")
    before, after = line[max(match.start() - NEAR, 0) : match.start()], line[end:][:NEAR]
    currency = before[-1:] if before[-1:] and before[-1:] in CURRENCIES else ""
    if currency:
        before = before[:-1]
        if before[-2:] in ("-", " -"):
            before, sign = before[:-1], "-"
    if match["top"] and match["top"][0] == "(":
        before += "("
    if "," in match[0] and before.endswith("(") and after.startswith(")"):
        return None  # (1,200) may be a pair
    currency_or_noun = bool(currency) or re.match(r" ?[A-Za-z%$€\u00b0]", after) is not None
    if not (_free_before(before, after, noun=currency_or_noun) and _free_after(after)):
        return None
    if not _told_alone(line[: match.start()], line[end:]):
        return None
    value = value_of(match)
    unit = known_unit(after, currency)
    return None if value is None else Number(-value if sign == "-" else value, unit)


def _told_alone(before: str, after: str) -> bool:
    """True if the clauses around a number neither doubt it nor tell of another one."""
    sentence = re.split(r"[.;!?](?:\s|$)", before[-MAX_ANSWER:])[-1]
    if doubtful(clause_before(sentence)) or _OTHER.search(sentence):
        return False
    inside, later = _split_clause(after)
    if NOT_BEHIND & {*re.findall(r"[a-z]+", inside.lower())} or "n't" in inside:
        return False
    later = re.sub(r"^ not\b[^.;!?]*", "", later)  # 5, not 6
    return not (later.strip(" .)") and taken_back(later))


def _split_clause(after: str) -> tuple[str, str]:
    """The rest of a number's clause, and what follows that."""
    end = re.search(r"[.;!?,](?=\s|$)", after)
    return (after, "") if end is None else (after[: end.start()], after[end.end() :])


def _free_before(before: str, after: str, *, noun: bool) -> bool:
    """True if what stands before a number leaves it what it is."""
    text = before.rstrip()
    if not text:
        return True
    if _LIST.search(text) and not re.match(r" ?[A-Za-z%$€]{2}", after):
        return False
    last, touching = text[-1], text == before
    if last in _MARKS:
        return _free_behind_mark(text, touching=touching)
    if last.isalpha() or (last == "'" and text[-2:-1].isalpha()):
        return not _RATIO.search(text) and _word_before(text, noun=noun)
    if last == "=":
        return _equals(text[:-1])
    if last in "-+":
        return text == "-"  # a list's item
    if last == "(" and not re.search(r"[\w)\]{}'\u221a^]\($|[+*/-] ?\($", text):
        return not text[:-1].strip() or _word_before(text[:-1].rstrip(), noun=noun)
    return last in ">\u2192" and (
        text[-2:] == "=>" or not re.search(r"[^\W\d] ?(?:->|\u2192)$", text)
    )


def _free_behind_mark(text: str, *, touching: bool) -> bool:
    """True if a text that ends in a punctuation mark leaves the number behind it what it is."""
    last = text[-1]
    if last == ":" and re.search(r"[0-9)] ?:$", text):
        return re.search(r"[A-Za-z] [0-9]{1,3}\)?:$", text) is not None and _labelled(text)
    if last in ".:)]?~" and touching:
        return last in ":~" and not text[-2:-1].isdigit()
    if last in ",;" and _ends_in_number_word(text):
        return False
    words = _last_words(text[:-1])
    return not (last in ":;,.?" and words and words[-1] in _NEVER)


def _last_words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z'/]+", re.split(r"[^A-Za-z'/ -]", text)[-1].lower())[-4:]


def _labelled(text: str) -> bool:
    """True if a text ends in a label such as "Step 2:", unlike "The ratio is 2:"."""
    words = _last_words(text.rstrip(": ").rstrip("0123456789 )"))
    return bool(words) and words[-1] in LABELS | REFUSED_BEFORE


def _ends_in_number_word(text: str) -> bool:
    words = re.findall(r"[a-z]+", text.lower())
    return bool(words) and words[-1] in NUMBER_WORDS


def _word_before(text: str, *, noun: bool) -> bool:
    """True if the words before a number tell that it is something's value.

    noun: True if it has a currency, or a word behind it.
    """
    words = _last_words(text)
    if not words:
        return True
    last, earlier = words[-1], words[-2] if words[1:] else ""
    if (len(last) == 1 and last not in ("a", "i")) or last in _NEVER:
        return False
    if last == "of":
        return _amount_of(words)
    if last in ("to", "with"):
        return earlier in (TOLD_TO if last == "to" else LEFT_WITH)
    if last in TELLS or (last in PLACED and noun):
        return True
    return (
        re.fullmatch(r"[a-z]{2,}ed|[a-z]{2,}ing", last) is not None
        or (earlier in DOERS and last not in PLACED)
        or (last.endswith("s") and re.search(r"\b[A-Z][a-z]+ \w+$", text) is not None)
    )


def _amount_of(words: list[str]) -> bool:
    """True of "a total of", "at a price of" and "consists of", unlike "half of"."""
    if words[-2:-1] == [] or words[-2] not in AMOUNTS:
        return False
    if words[-2] in ("total", "answer", "result", "consists"):
        return True
    return words[-3:-2] != ["absolute"] and bool({"a", "an"} & {*words[:-2]})


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
    word = side[-1].lower() if side else ""
    if word in PLACES or word in REFUSED_BEFORE or (word in _DOUBTS and not whole):
        return False
    if whole and _DOUBTS & {*re.findall(r"[a-z']+", left.lower())}:
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
        return not touching and re.match(r"- [A-Za-z]{2}", text) is not None
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
    return known and (word.lower() not in NOT_AFTER or text.lower().startswith("or so"))


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
