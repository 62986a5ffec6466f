"""Judges the words around an answer: do they deny it, suppose it, or take it back? Plain Python.

Every function is linear in the length of its text.
"""

from __future__ import annotations

import re

from localrl.rewards.vocabulary import DENIALS, SUPPOSITIONS

READ = 1000
"""Characters after an answer in which it may be taken back."""
NEAR = 80
"""Characters before an answer in which it may be denied."""

_CLAUSE_END = re.compile(
    r"[.;!?,](?:\s|$)|\b(?:so|thus|therefore|hence|then|but|because|since|leaving)\b"
    r"|(?<!if )(?<!when )\b(?:we|you|one) (?:get|obtain|find)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;\n]+[\s)*_$}]*")
_WORDS = re.compile(r"[A-Za-z']+")
_POSSIBLE = re.compile(
    r"\b(?:could|might|may) (?:also )?(?:be|equal|have been)\b|\bgiven that\b", re.IGNORECASE
)

_AFRESH = (
    r"(?:wait|hold on|sorry|oops|whoops|correction|scratch (?:that|it)|strike (?:that|it)"
    r"|on second thoughts?|on reflection|never ?mind|my (?:mistake|bad|error)"
    r"|i take (?:that|it) back"
    r"|i (?:made|was (?:wrong|mistaken)|misread|miscounted|miscalculated|misspoke|meant|mean)"
    r"|let me (?:redo|recompute|recalculate|recount|rethink|reconsider|correct|fix|try again|start"
    r" over))\b"
)
_TURN = re.compile(
    rf"\W*(?:{_AFRESH}|(?:no|nope|not|but|or|however|h+m+|maybe|perhaps|alternatively|actually"
    r"|rather|instead|wrong|incorrect|edit)\b)",
    re.IGNORECASE,
)
_MIDWAY = re.compile(rf"[,;:\u2014\u2013(-] ?(?:no |but |or |and )?{_AFRESH}", re.IGNORECASE)
_LATER = re.compile(rf"\W*(?:(?:no|but|and|oh|ah),? )?{_AFRESH}", re.IGNORECASE)
_ASIDE = re.compile(r"\b(?:wait|actually|sorry|oops|correction) ?[,.:!]", re.IGNORECASE)
_WRONG = (
    r"(?:[a-z]+ )?(?:wrong|incorrect|mistaken|false|invalid|impossible|a mistake|an error"
    r"|not (?:right|correct|true|valid|possible|it|so|quite|the (?:[a-z]+ )?(?:answer|solution))"
    r"|too (?:small|big|large|high|low|many|few|much|little))\b"
)
_IS = r"(?: ?(?:is|was|am|would be|looks|seems|must be)\b|'s) "
_CONDEMNED = re.compile(
    rf"\b(?:that|this|it|which|i|answer|result|value|above){_IS}{_WRONG}"
    r"|\b(?:that|this|it|which|answer|result)(?: (?:is|was))?(?:n't| cannot be| can't be)\b",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    rf"[\W_]{{0,9}}(?:{_IS.replace(' ?', '')}{_WRONG}|(?:is|was|does|do|did)(?:n't| not) "
    r"(?:the |a |an |my )?(?:right|correct|answer|solution|true|valid|possible|what|it|so|work|fit"
    r"|hold|final|equal)\b|(?:is|was)(?:n't| not)\W*$|(?:cannot|can't|could not|couldn't) be\b"
    r"|fails\b|is (?:never|no)\b(?: the| an?)? (?:answer|solution))"
    rf"|[^\w.]{{0,6}}(?:but |which |and |that |this |it )+(?:is|was) {_WRONG}"
    r"|[^\w,.;:]{0,6}\(?(?:wrong|incorrect|false)\b"
    r"|[^\w.]{0,6}\? *(?:no|nope|not|wrong)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|without|excluding|except|unlike)|n't"
    r"|\banything but|\bdoubt (?:that )?it is|\bif (?:it|that|x) (?:is|was|were)"
    r"|\b(?:different|far|apart|aside) from|(?<!none )\bother than"
    r"|\b(?:rather|less|more|greater|larger|smaller|fewer|lower|higher|bigger) than|\binstead of"
    r"|\bwrong(?:ly)? to (?:say|answer|write|claim)|\b(?:could|might|may) be)"
    r"(?: (?:be|equal|to|simply|just|exactly|really|actually|the|a|an|answer|is|say|claim))*"
    r"[ $*_\n\\(\[]*$",
    re.IGNORECASE,
)


def clause_before(text: str) -> str:
    """The clause that a text ends within."""
    return _CLAUSE_END.split(text)[-1]


def doubtful(clause: str) -> bool:
    """True if a clause denies what it says, or only supposes it."""
    words = {*_WORDS.findall(clause.lower())}
    return (
        bool((DENIALS | SUPPOSITIONS) & words)
        or any(word.endswith("n't") for word in words)
        or _POSSIBLE.search(clause) is not None
    )


def taken_back(rest: str) -> bool:
    """True if the text after an answer's sentence takes it back.

    The sentence behind it does so if it begins with "no", "however" or the like, or calls the
    answer wrong; a later one only if it begins afresh, as in "Wait, it is 6".
    """
    first, *others = _SENTENCE_END.split(rest[:READ].lstrip(" \t\r\n.!;)*_$}"))
    if _TURN.match(first) or _CONDEMNED.search(first) or anew(rest):
        return True
    return any(map(_LATER.match, others))


def anew(rest: str) -> bool:
    """True if the text behind an answer turns in the middle of a sentence: ", scratch that, 6"."""
    rest = rest[:READ]
    return _ASIDE.search(rest) is not None or _MIDWAY.search(rest) is not None


def denied_around(before: str, after: str) -> bool:
    """True if an answer, such as a box, is denied directly before it or called wrong behind it."""
    if _DENIED.search(before[-NEAR:]) or _BEHIND.match(after[:NEAR]) or anew(after):
        return True
    ends = _SENTENCE_END.search(after[:READ])
    return ends is not None and taken_back(after[ends.end() :])
