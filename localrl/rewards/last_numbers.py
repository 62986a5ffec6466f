"""Reads the number that a text ends with. Plain Python: runs in a child process.

It counts only if its clause tells it: where the words around it make something else of it, or may
do so, there is none.
"""

from __future__ import annotations

import re
from collections import deque

from localrl.rewards.context import clause_before, doubtful, taken_back
from localrl.rewards.measures import known_unit, read_unit
from localrl.rewards.notation import CURRENCIES, MAX_ANSWER, plain
from localrl.rewards.rational import UNSIGNED, Number, parse, value_of
from localrl.rewards.statements import equals, undecorated, with_spaces
from localrl.rewards.vocabulary import (
    AMOUNTS,
    DOERS,
    LABELS,
    LEFT_WITH,
    NOT_AFTER,
    NOT_BEHIND,
    NUMBER_WORDS,
    PLACED,
    REFUSED_BEFORE,
    TELLS,
    TOLD_TO,
)

MAX_TAIL = 4000
"""Characters at the end of a text in which its last number is looked for."""
NEAR = 80
"""Characters before and after a number that decide if it stands alone."""
FAR = 300
"""Characters before a number in which its sentence may doubt it, or give another one."""

_IN_TEXT = re.compile(
    r"(?:(?<![\w)\]}%^])(?<!\^\{)(?P<sign>[+-])|(?<![\w^\\])(?<!\^\{)(?<!\^-)(?<!\^\{-))"
    rf"(?>{UNSIGNED})(?! ?\^|[²³\u2070-\u2079])"
)
_TOUCHING = re.compile(r"[A-Za-zµ]+(?:/[a-z]+)?[²³]?")
_REFUSED_AFTER = re.compile(
    r"(?:[a-z]+ )?than\b|for (?:each|every)\b|(?:percent |per cent )?of (?:[b-z]\b|[0-9])"
    r"|from (?:the )?(?:end|start|top|bottom|zero|[b-z])\b|(?:before|after) [b-z]\b"
    r"|at (?:the )?(?:least|most)\b"
    r"|(?:is|was) (?:[a-z]+ )?(?:not|wrong|incorrect)\b|(?:is|was)n't\b",
    re.IGNORECASE,
)
_MARKS = ',;:.?"\u2014\u201c\u201d\u2026\u2248#)]~'
_PHRASE = re.compile(r"\b(?:adds? up to|(?:gives?|gave|given|throws?|threw) away)$")
_NEVER = REFUSED_BEFORE | LABELS
_OTHER = re.compile(
    r"(?:\b(?:is|are|was|were|has|have|had|gets?|equals?)|=) [$€£]?-?[0-9][^;]{0,200}?"
    r"(?:,|\b(?:and|while|whereas|but)\b|&)(?![0-9])"
    r"(?![^;]*\b(?:so|thus|therefore|hence|then|gives?|giving|makes?|making|leaving|leaves?|left"
    r"|total|together|altogether|which|that|because|since|get|sum|result|answer|need|needs)\b)"
    r"|\w: ?[0-9.]+[,;] [\w ]{1,20}: ?$"
    rf"|\b(?:{'|'.join(NUMBER_WORDS)}) (?:and|or|to|plus|minus|times)$",
    re.IGNORECASE,
)
_RATIO = re.compile(r"(?:[0-9%)] (?:to|in|per|for every)|\bup to|or equal to)$|\\[A-Za-z]+$")
_LIST = re.compile(r"(?:[0-9%)\u221e\u2026]|\.\.|dots) ?(?:,|;|,? and|,? or)$")


def last_number(text: str) -> Number | None:
    """The last number in the last `MAX_TAIL` characters of a text, with its unit if it is known.

    Digits inside a word (x2), exponents and their bases are skipped; powers of ten count. None if
    the last number is a part of something else: of a sum, a list, a range, or "not 5".
    """
    lines = plain(undecorated(text[-MAX_TAIL:])).split("\n")
    rest = ""
    for line in reversed(lines):
        line = with_spaces(" ".join(line.split()))
        found = deque(_IN_TEXT.finditer(line), maxlen=1)
        if found:
            if rest.strip() and taken_back(rest):
                return None
            return parse(line) or _alone(found[0])
        rest = f"{line}\n{rest}"[:MAX_ANSWER]
    return None


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
    sentence = re.split(r"[.;!?](?:\s|$)", before[-FAR:])[-1]
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
        told = _PHRASE.search(text) is not None
        return told or (not _RATIO.search(text) and _word_before(text, noun=noun))
    if last == "=":
        return equals(text[:-1])
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
        re.fullmatch(r"[a-z]{2,}ed", last) is not None
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
