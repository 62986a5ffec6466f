"""Pre-tokenizers, which split text for byte-level vocabularies, by llama.cpp's names.

The expressions are those of the models' own tokenizer.json; "default" is llama.cpp's, for
vocabularies without a name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localrl.gguf.reader import refused

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(contractions: str, digits: str) -> str:
    """Return an expression that also splits words where a capital follows lower-case letters."""
    before = r"[^\r\n\p{L}\p{N}]?"
    small = rf"{before}{_UPPER}*{_LOWER}+{contractions}"
    capital = rf"{before}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{small}|{capital}|{digits}|{_SLASH}"


_TEKKEN = _cased("", r"\p{N}")
_GPT4O = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class Pretokenizer:
    """One way to split text into words."""

    cuts: tuple[str, ...] = ()
    """Expressions applied in order; each match becomes a separate piece."""
    gpt2: bool = False
    """True if GPT-2's own expression is applied last."""
    composed: bool = False
    """True if characters are composed first (NFC)."""
    whole_words: bool = False
    """True if a word that is a token stays whole, regardless of merges."""
    begins: bool = False
    """True if text begins with the begin token, unless the file says otherwise."""

    def json(self) -> dict[str, Any]:
        """Return the pre-tokenizer in tokenizer.json format."""
        cuts = [
            {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
            for cut in self.cuts
        ]
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {"type": "Sequence", "pretokenizers": [*cuts, {**last, "use_regex": self.gpt2}]}


_PLAIN = Pretokenizer(gpt2=True)
_DIGITS = Pretokenizer((r"\p{N}",), gpt2=True)
_QWEN2 = Pretokenizer((_QWEN,))
_LLAMA = Pretokenizer((_LLAMA3,), whole_words=True, begins=True)

PRETOKENIZERS: dict[str, Pretokenizer] = {
    "default": Pretokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    **dict.fromkeys(("gpt-2", "olmo", "jais", "trillion", "mellum", "exaone4"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "qwen2": replace(_QWEN2, composed=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA),
    **dict.fromkeys(("dbrx", "smaug-bpe"), replace(_LLAMA, whole_words=False, begins=False)),
    "tekken": Pretokenizer((_TEKKEN,), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Pretokenizer((_GPT4O,))),
}
"""Pre-tokenizers by the name in `tokenizer.ggml.pre`."""


def find_pretokenizer(path: Path, name: str | None) -> Pretokenizer:
    """Find a pre-tokenizer by name.

    Raises: ConfigError if it is unknown; a different one would give wrong tokens.
    """
    if name is None:
        raise refused(path, "it names no pre-tokenizer (tokenizer.ggml.pre); it is an old file")
    if name not in PRETOKENIZERS:
        raise refused(
            path,
            f"its pre-tokenizer {name!r:.60} is unknown; known are {', '.join(PRETOKENIZERS)}",
        )
    return PRETOKENIZERS[name]
