"""Finds the letter that an answer to a multiple-choice question chooses. Plain Python."""

from __future__ import annotations

import re
from collections import deque

from localrl.rewards.context import anew, taken_back
from localrl.rewards.extract import GSM8K, boxed_answer, last_line, stated, without_thought
from localrl.rewards.notation import MAX_ANSWER, simplify

_ALONE = re.compile(r"[\s(\[*_`]*([A-Za-z])[\s)\]*_`.:,]*")
_FIRST = re.compile(r"[\s*_`]*(?:\(([A-Za-z])\)|([A-Z])[).:](?![A-Z]\.))")
_OPTION = re.compile(r"\s*(?:the )?(?:option|choice) {1,3}\(?([A-Za-z])\b", re.IGNORECASE)

_ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice|alternative|letter|statement|one|solution|result)[\s*_`\"]{0,4}"
    r"(?:(?:is|must be|should be|would be)\b|:|=)"
    r"|\b(?:i|we)(?: would| will|'d|'ll)? (?:choose|chose|pick|picked|select|selected|go with)\b"
    r"|\b(?:i|we)(?: would|'d) say\b|\b(?:believe|think|say|guess"
    r"|conclude)(?: that)? it(?: is|'s| must be)\b"
    r"|(?:\u7b54\u6848|\u9009\u9879)\s?(?:\u662f|\u4e3a|[:\uff1a])|\u9009\u62e9?",  # Chinese
    re.IGNORECASE,
)
_SHORT = re.compile(
    r"(?:(?:so|thus|therefore|hence|then)\b,? )?(?:(?:the|my|our|final|correct|best|right) )*"
    r"(?:ans(?:wer)?|option|choice|solution|result|choose|select|pick|letter|correct"
    r"|selected|chosen)\b"
    r"(?:[.:]| ?[-\u2013\u2014=](?= ))?(?: the)?(?: (?:option|choice|answer))? ",
    re.IGNORECASE,
)
"""A line that names a choice without a verb: Answer B, Thus, option B."""
_LEAD = re.compile(
    r"(?:[\s:*_`\[\"$\u201c\u2018\uff1a]|\\(?:boxed|text|textbf|mathrm|mathbf) ?\{"
    r"|(?:clearly|therefore|thus|simply|obviously|definitely|the|correct|right|best"
    r"|option|choice|letter|answer|alternative)\b)*",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[(\[*_\"'$\u201c\u2018]*[A-Z]\b(?!['\u2019])")
_LEADING = re.compile(
    r"\(\s?([A-Za-z])\s?\)|['\u2018]([A-Z])['\u2019]"
    r"|([A-Z])(?![\w'\u2019^(]|\s?[-+=<>/*]\s?(?:[0-9+]|\w\b))",
    re.ASCII,
)
_ARTICLE = re.compile(
    r" (?!(?:because|since|as|is|was|for|which|with|that|and|but|due|given|so|in|by)\b)[a-z]"
)
_JOINED = (
    r"(?:or|and|nor|to|through|thru|till|until|plus|minus|with|but|maybe|perhaps|possibly|however"
    r"|rather|also|even|either|otherwise|else|as well(?: as)?|together|alternatively|both"
    r"|versus|vs)"
)
_SEVERAL = re.compile(
    rf"[)\]*_`\"'}} .:]*(?:[,;/&+~*\u00d7\u2013\u2014-]|\b{_JOINED}\b)[ (*,]*"
    rf"(?:{_JOINED}\b[ (*,]*){{0,3}}(?:(?:option|choice) )?[A-Z]\b(?!['\u2019])",
)
_CONDITION = re.compile(
    r"\W*(?:(?:unless|if|except|only if|provided|assuming)\b"
    r"|(?:al)?though\b.{0,30}\b(?:could|might|may)\b)",
    re.IGNORECASE,
)
_DOUBTED = re.compile(r"(?:\b(?:not|never|if|unless|cannot)|n't)\b[a-z ]{0,20}$", re.IGNORECASE)
_TAKEN_BACK = re.compile(
    r"\W*(?:(?:no|nope|or|h+m+|wait|actually|sorry|oops)\b|not\b(?!\W*(?-i:[A-Z])\b)"
    r"|but,? (?:no|wait|actually|then|not(?! because)|i|that|this|it)\b"
    r"|(?:is|was)(?: not| wrong| incorrect| false|n't)\b|fails\b|does(?:n't| not)\b"
    r"|(?:cannot|can't|could not|couldn't) be\b)"
    r"|[)\]*_\"' ]*\?"
    r"|(?s:.*)\b(?:wait|actually|sorry|oops|correction)\s?[,.:!]",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r".*\b(?:so|thus|therefore|hence)\b([^()]*\(([A-Z])\)[^()]*)", re.IGNORECASE
)
_OTHERS = re.compile(r"\W*not (?:(?:option|choice) )?\(?[A-Z]\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?]\s|\n")
_QUOTED = re.compile(r"[\"\u201c\u00ab](.*)[\"\u201d\u00bb]\.?|'(.*)'\.?", re.DOTALL)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_CORRECT = re.compile(
    r"(?:(?:so|thus|therefore|hence|then)\b,? )?(?:the )?(?:(?:option|choice|answer"
    r"|letter|statement) )?"
    r"\(?([A-Z])\)? (?:is|must be) (?:the |therefore |clearly |obviously )*"
    r"(?:correct|right|best|true|answer)\b",
    re.IGNORECASE,
)
_THEREFORE = re.compile(
    r"(?:so|thus|therefore|hence|it is|it's|it (?:must|should) be)\b[,:]? +\(?([A-Z])\)?\W*",
    re.IGNORECASE,
)


def choice(text: str) -> str | None:
    """The letter that this text is or begins with: B, (b), B., B) Paris."""
    text = simplify(text[:MAX_ANSWER])
    quoted = _QUOTED.fullmatch(text)
    text = (quoted[1] or quoted[2] or "") if quoted else text
    alone = _ALONE.fullmatch(text)
    if alone:
        return alone[1].upper()
    first = _FIRST.match(text) or _OPTION.match(text)
    return next(filter(None, first.groups())).upper() if first else None


def chosen(text: str) -> str | None:
    """The letter that a completion chooses after the last </think>; None if it is undecided.

    It is in the last box; else after "answer is", "answer:", "the correct option is" or "I choose",
    where a capital that stands alone counts, whatever follows, unless that is another letter or
    takes it back; else in the last line.
    """
    text = without_thought(text)
    boxed = boxed_answer(text)
    if boxed is not None:
        return _leading(simplify(boxed))
    statement = _statement(text)
    return _of_line(last_line(text)) if statement is None else _leading(statement)


def _statement(text: str) -> str | None:
    """The text after the last words that announce a choice."""
    if "<answer>" in text or GSM8K in text:
        return stated(text)
    found = deque(_ANNOUNCED.finditer(text), maxlen=1)
    if found:
        start, end = found[0].span()
        return "" if _DOUBTED.search(text[max(start - 40, 0) : start]) else text[end:]
    line = last_line(text).lstrip("*_# ")
    short = _SHORT.match(line)
    return line[short.end() :] if short and _LETTER.match(line, short.end()) else None


def _leading(text: str) -> str | None:
    """The letter that a statement begins with."""
    text = text[:MAX_ANSWER]
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    alone = _ALONE.fullmatch(text.rstrip('}$" \u201d\u2019\u3002'))
    if alone:
        return alone[1].upper()
    match = _LEADING.match(text)
    if match is None:
        return None
    letter, rest = next(filter(None, match.groups())).upper(), text[match.end() :].lstrip("}")
    word = match[3] is not None and letter in "AI" and _ARTICLE.match(rest)
    return None if word or _undecided(rest) else letter


def _of_line(line: str) -> str | None:
    """The letter that a line is, begins with, or calls correct; else the only (X) in it."""
    line = simplify(line[-MAX_ANSWER:])
    concluded = _CONCLUDED.fullmatch(line)
    if concluded and not _denied(concluded[1]):
        return concluded[2].upper()
    brackets = set(_IN_BRACKETS.findall(line))
    match = _CORRECT.match(line) or _THEREFORE.fullmatch(line)
    letter = match[1].upper() if match else choice(line)
    if letter is None:
        return brackets.pop() if len(brackets) == 1 and not _denied(line) else None
    rest = line[line.upper().find(letter) + 1 :].lstrip(")")
    return None if brackets - {letter} or (not match and _undecided(rest)) else letter


def _undecided(rest: str) -> bool:
    """True if the text after a letter names another one, or takes it back."""
    if anew(rest) or any(p.match(rest) for p in (_SEVERAL, _CONDITION, _TAKEN_BACK)):
        return True
    ends = _SENTENCE_END.search(rest)
    later = "" if ends is None else rest[ends.end() :]
    return not _OTHERS.match(later) and taken_back(later)


def _denied(line: str) -> bool:
    return re.search(r"\b(?:not|wrong|incorrect|neither|false)\b|n't\b", line) is not None
