"""Finds the letter that an answer to a multiple-choice question chooses. Plain Python."""

from __future__ import annotations

import re

from localrl.rewards.extract import GSM8K, last_boxed, last_line, stated, without_thought
from localrl.rewards.notation import MAX_ANSWER, simplify

_ALONE = re.compile(r"[\s(\[*_`]*([A-Za-z])[\s)\]*_`.:,]*")
_FIRST = re.compile(r"[\s*_`]*(?:\(([A-Za-z])\)|([A-Z])[).:])")
_OPTION = re.compile(r"\s*(?:the )?(?:option|choice) {1,3}\(?([A-Za-z])\b", re.IGNORECASE)

_ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice|alternative|letter)[\s*_`\"]{0,4}"
    r"(?:(?:is|must be|should be|would be)\b|:|=)"
    r"|\b(?:i|we)(?: would| will|'d|'ll)? (?:choose|chose|pick|picked|select|selected|go with)\b",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:[\s:*_`\[\"$]|\\(?:boxed|text|textbf|mathrm|mathbf) ?\{|(?:clearly|therefore|thus|simply"
    r"|obviously|definitely|the|correct|right|best|option|choice|letter|answer|alternative)\b)*",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"\(\s?([A-Za-z])\s?\)|'([A-Z])'"
    r"|([A-Z])(?![\w'\u2019^(]|\s?[-+=<>/*]\s?(?:[0-9+]|\w\b))",
    re.ASCII,
)
_ARTICLE = re.compile(
    r" (?!(?:because|since|as|is|was|for|which|with|that|and|but|due|given|so|in|by)\b)[a-z]"
)
_SEVERAL = re.compile(
    r"[)\]*_`\"'} .:]*(?:[,;/&]|\b(?:or|and|nor)\b)[ (*]*"
    r"(?:(?:or|and|nor|maybe)\b[ (*]*)?[A-Z]\b(?!')"
)
_TAKEN_BACK = re.compile(
    r"\W*(?:(?:no|or|hmm)\b|(?:is|was) (?:not|wrong|incorrect|false|n't)\b)"
    r"|(?s:.*)\b(?:wait|actually|sorry|oops|correction)\b",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_CORRECT = re.compile(
    r"(?:(?:so|thus|therefore|hence|then)\b,? )?(?:the )?(?:(?:option|choice|answer|letter) )?"
    r"\(?([A-Z])\)? (?:is|must be) (?:the |therefore |clearly |obviously )*"
    r"(?:correct|right|best|true|answer)\b",
    re.IGNORECASE,
)
_THEREFORE = re.compile(
    r"(?:so|thus|therefore|hence|it is|it's|it must be)\b[,:]? +\(?([A-Z])\)?\W*", re.IGNORECASE
)


def choice(text: str) -> str | None:
    """The letter that this text is or begins with: B, (b), B., B) Paris."""
    text = simplify(text[:MAX_ANSWER])
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
    boxed = last_boxed(text)
    if boxed is not None:
        return _leading(simplify(boxed))
    statement = _statement(text)
    return _of_line(last_line(text)) if statement is None else _leading(statement)


def _statement(text: str) -> str | None:
    """The text after the last words that announce a choice."""
    if "<answer>" in text or GSM8K in text:
        return stated(text)
    ends = [match.end() for match in _ANNOUNCED.finditer(text)]
    return text[ends[-1] :] if ends else None


def _leading(text: str) -> str | None:
    """The letter that a statement begins with."""
    text = text[:MAX_ANSWER]
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    alone = _ALONE.fullmatch(text.rstrip('}$" '))
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
    brackets = set(_IN_BRACKETS.findall(line))
    match = _CORRECT.match(line) or _THEREFORE.fullmatch(line)
    letter = match[1].upper() if match else choice(line)
    if letter is None:
        return brackets.pop() if len(brackets) == 1 and not _denied(line) else None
    rest = line[line.upper().find(letter) + 1 :].lstrip(")")
    return None if brackets - {letter} or (not match and _undecided(rest)) else letter


def _undecided(rest: str) -> bool:
    """True if the text after a letter names another one, or takes it back."""
    return bool(_SEVERAL.match(rest) or _TAKEN_BACK.match(rest))


def _denied(line: str) -> bool:
    return re.search(r"\b(?:not|wrong|incorrect|neither|false)\b|n't\b", line) is not None
