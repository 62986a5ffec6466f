"""Rewrites LaTeX and typographic notation as plain text. Plain Python: runs in a child process.

Every function is linear in the length of its text.
"""

from __future__ import annotations

import re
import unicodedata

MAX_ANSWER = 2000
"""Maximum characters in an answer; a longer text is not one."""
CURRENCIES = "$€£¥₹"

_GREEK = {
    **{"alpha": "\u03b1", "beta": "\u03b2", "gamma": "\u03b3", "delta": "\u03b4"},
    **{"epsilon": "\u03b5", "varepsilon": "\u03b5", "zeta": "\u03b6", "eta": "\u03b7"},
    **{"theta": "\u03b8", "vartheta": "\u03b8", "iota": "\u03b9", "kappa": "\u03ba"},
    **{"lambda": "\u03bb", "mu": "\u00b5", "nu": "\u03bd", "xi": "\u03be", "pi": "\u03c0"},
    **{"rho": "\u03c1", "varrho": "\u03c1", "sigma": "\u03c3", "tau": "\u03c4"},
    **{"upsilon": "\u03c5", "phi": "\u03c6", "varphi": "\u03c6", "chi": "\u03c7"},
    **{"psi": "\u03c8", "omega": "\u03c9", "Gamma": "\u0393", "Delta": "\u0394"},
    **{"Theta": "\u0398", "Lambda": "\u039b", "Xi": "\u039e", "Pi": "\u03a0", "Sigma": "\u03a3"},
    **{"Phi": "\u03a6", "Psi": "\u03a8", "Omega": "\u03a9"},
}
_LETTER = "A-Za-z\u00b5\u0391-\u03c9"
_COMMANDS = {
    **dict.fromkeys(("left", "right", "displaystyle", "therefore", "limits"), ""),
    **dict.fromkeys(("quad", "qquad", "space"), " "),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"),
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("implies", "Rightarrow", "Longrightarrow"), " => "),
    **dict.fromkeys(("ne", "neq"), "\u2260"),
    **dict.fromkeys(("le", "leq", "leqslant"), "\u2264"),
    **dict.fromkeys(("ge", "geq", "geqslant"), "\u2265"),
    **dict.fromkeys(("approx", "simeq"), "\u2248"),
    **dict.fromkeys(("circ", "degree"), "°"),
    "lt": "<",
    "gt": ">",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "div": "\u00f7",
    "pm": "\u00b1",
    **_GREEK,
    **dict.fromkeys(("emptyset", "varnothing"), "\u2205"),
    "infty": "\u221e",
    "cup": "\u222a",
    "cap": "\u2229",
    "euro": "€",
    "pounds": "£",
}
"""Commands that have a plain character; others stay as they are."""
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_SYMBOLS = (
    *(("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\:", ""), ("\\ ", " "), ("~", " ")),
    *(("{,}", ","), ("^{°}", "°"), ("^°", "°"), ("\\%", "%")),
    *(("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", "")),
)
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2009\u202f\u2006\u200a", None),  # thin spaces, as between thousands
        **dict.fromkeys("\u200b\u2060\ufeff\u200e\u200f", None),
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "*"),
        **dict.fromkeys("\u066b\uff0e\u3002\uff61", "."),
        **{"\u221b": "\u221a[3]", "\u221c": "\u221a[4]"},
        **dict.fromkeys("\u066c\uff0c", ","),
        **dict.fromkeys("\u066a\uff05", "%"),
        **{"\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4", "\u2153": " 1/3"},
        **{"\u2154": " 2/3", "\u2044": "/", "\uff04": "$", "\u03bc": "µ", "\u2019": "'"},
    }
)
_DIGIT = re.compile(r"[^\W\x00-\x7f]")
_DOLLAR = re.compile(r"\$(?= ?-?[0-9])")
_STYLED = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname|mbox) ?\{([^{}]*)\}"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:align|aligned|equation|gather|gathered)\*?\}")
_CROSS = re.compile(r"(?<=[0-9]) ?x ?(?=\$?[0-9])")
_ARGUMENT = rf"(?:\{{([^{{}}]*)\}}|([0-9{_LETTER}]))"
_FRACTION = re.compile(rf"\\frac ?{_ARGUMENT} ?{_ARGUMENT}")
_ROOT = re.compile(rf"\\sqrt ?(?:\[([^\[\]{{}}]{{1,9}})\] ?)?{_ARGUMENT}")
_PLAIN_ROOT = re.compile(rf"\u221a(\[[34]\])? ?([0-9]+(?:\.[0-9]+)?|[{_LETTER}])")
_NAMED_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt ?\(")
_ATOM = re.compile(rf"[0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|[{_LETTER}]|\u221a\([^()]*\)")
_FACTOR = re.compile(rf" ?(?:[{_LETTER}](?![A-Za-z])|[0-9(\\\u221a])")
_TIMES_POWER = re.compile(r"(?<=[0-9.]) ?\* ?10 ?\^ ?(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))")
_POWER = re.compile(r"(?<![\w.^{])10\^(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))")


def simplify(text: str) -> str:
    """Rewrite LaTeX as plain text, and collapse white space to single spaces.

    Dollar signs that mark mathematics are dropped; those of prices stay. Digits of other scripts
    become 0 to 9, fractions a/b, powers of ten exponents, and roots √(a).
    """
    return " ".join(plain(text).split())


def plain(text: str) -> str:
    """Do what `simplify` does, but keep white space, line ends too."""
    text = text.replace("$$", "$").replace("\\$", "\uff04")
    text = _without_dollars(text)
    if not text.isascii():
        text = _DIGIT.sub(_ascii_digit, text.translate(_CHARACTERS))
        text = _PLAIN_ROOT.sub("\u221a\\1(\\2)", text)
    if "\\" in text or "{,}" in text:
        text = _without_latex(text)
    if "sqrt" in text:
        text = _NAMED_ROOT.sub("\u221a(", text)
    if "x" in text:
        text = _CROSS.sub("*", text)
    if "10" in text:
        text = _TIMES_POWER.sub(r"e\1\2", text)
        text = _POWER.sub(r"1e\1\2", text)
    return text


def _without_dollars(text: str) -> str:
    """Drop dollar signs in pairs; a single one before a number is a price."""
    if text.count("$") % 2:
        text = _DOLLAR.sub("\uff04", text)
    return text.replace("$", "").replace("\uff04", "$")


def _ascii_digit(match: re.Match[str]) -> str:
    digit = unicodedata.decimal(match[0], None)
    return match[0] if digit is None else str(digit)


def _without_latex(text: str) -> str:
    text = _COMMAND.sub(_command, _ENVIRONMENT.sub(" ", text))
    for old, new in _SYMBOLS:
        text = text.replace(old, new)
    text = _STYLED.sub(r" \1", text)
    for _ in range(2):  # a root in a fraction, and a fraction in a root
        text = _ROOT.sub(_root, text)
        text = _FRACTION.sub(_fraction, text)
    return text


def _command(match: re.Match[str]) -> str:
    return _COMMANDS.get(match[1], match[0])


def _root(match: re.Match[str]) -> str:
    degree = f"[{match[1]}]" if match[1] and match[1] != "2" else ""
    return f"\u221a{degree}({match[2] or match[3] or ''})"


def _fraction(match: re.Match[str]) -> str:
    """Write a fraction as a/b, in brackets where it is a factor, apart from a whole before it."""
    top, bottom = (_bracketed(match[i] or match[i + 1] or "") for i in (1, 3))
    ratio, text = f"{top}/{bottom}", match.string
    before = text[max(match.start() - 2, 0) : match.start()].rstrip()[-1:]
    if _FACTOR.match(text, match.end()) or before.isalpha() or before in (")", "}", "]"):
        return f"({ratio})"
    if before.isdigit():
        return f" {ratio}" if top.isdigit() and bottom.isdigit() else f"({ratio})"
    return ratio


def _bracketed(part: str) -> str:
    part = part.strip()
    return part if _ATOM.fullmatch(part) else f"({part})"
