"""Checks that text survives a tokenizer, and that transformers reads it as the file says.

transformers builds the tokenizers of some families from their vocabulary alone and ignores how
tokenizer.json splits text, without an error: spaces may be lost, or text may become other tokens
than those that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localrl.errors import ConfigError
from localrl.policy.prompt_format import backend
from localrl.policy.tokenizer import Tokenizer

TEXTS = (
    "The sum of 12 and 30 is 42, and it's what they'd say: \"3.5 * 2 = 7\".",
    'def add(a, b):\n    return {"sum": [a + b]}  # done\n\n\n\tand <b>more</b>!',
    "two  spaces   three, naïve café, 数学 и числа 🙂",
)
SPACE = "▁"
"""Sign that some normalisers write for a space."""
AT_THE_START = 2
"""Number of tokens by which two readings may differ at the start of a text: whether a space is put
before it is a setting of its own."""


@dataclass(frozen=True)
class TokenizerFault:
    """A way in which a tokenizer does not read text as it should."""

    text: str
    loses_text: bool
    """True if what was encoded does not come back."""


def find_faults(tokenizer: Tokenizer, folder: Path) -> list[TokenizerFault]:
    """Encode a few texts and decode them; also compare with the folder's own tokenizer.json."""
    texts = [readable for text in TEXTS if (readable := _known_part(tokenizer, text))]
    lost = next(_lost(tokenizer, texts), None)
    other = next(_read_otherwise(tokenizer, folder, texts), None)
    faults = []
    if lost:
        faults.append(TokenizerFault(f"text is lost: {lost[0]!r} comes back as {lost[1]!r}", True))
    if other:
        faults.append(
            TokenizerFault(
                f"transformers reads text otherwise than tokenizer.json: {other!r} becomes other "
                "tokens",
                False,
            )
        )
    return faults


def check_tokenizer(tokenizer: Tokenizer, folder: Path, *, strict: bool) -> list[str]:
    """Return warnings about the tokenizer in a model's folder.

    strict: refuse one that loses text.

    Raises: ConfigError, naming the model's family and the text.
    """
    faults = find_faults(tokenizer, folder)
    kind = type(getattr(tokenizer.inner, "_tokenizer", tokenizer.inner)).__name__
    lost = [fault for fault in faults if fault.loses_text]
    if lost and strict:
        raise ConfigError(
            f"The tokenizer in {folder} ({kind}): {'; '.join(fault.text for fault in faults)}. "
            "Prompts and answers would not be what they seem. If the folder's model_type or "
            "tokenizer_class is wrong, correct it; model.selfcheck=warn goes on with a warning."
        )
    return [f"the tokenizer in {folder} ({kind}): {fault.text}" for fault in faults]


def _known_part(tokenizer: Tokenizer, text: str) -> str:
    """Leave out the characters that the model says it has no token for; nothing is left if some
    have one only elsewhere. Prompts with unknown characters are refused for themselves."""
    unknown = tokenizer.unknown_id
    if unknown is None or unknown not in tokenizer.encode_text(text):
        return text
    known = "".join(c for c in text if unknown not in tokenizer.encode_text(c))
    return "" if unknown in tokenizer.encode_text(known) else known


def _lost(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[str, str]]:
    """Yield texts that do not come back, with what comes; a normaliser's own changes are none."""
    normal = getattr(backend(tokenizer.inner), "normalizer", None)
    for text in texts:
        back = tokenizer.inner.decode(
            list(tokenizer.encode_text(text)), clean_up_tokenization_spaces=False
        )
        wanted = normal.normalize_str(text).replace(SPACE, " ") if normal else text
        if back.strip() not in (text.strip(), wanted.strip()):
            yield text, back


def _read_otherwise(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> Iterator[str]:
    """Yield texts that the folder's tokenizer.json encodes differently."""
    from tokenizers import Tokenizer as Own

    file = folder / "tokenizer.json"
    if not file.is_file() or backend(tokenizer.inner) is None:
        return
    own = Own.from_file(str(file))
    for text in texts:
        one = list(tokenizer.encode_text(text))
        other = own.encode(text, add_special_tokens=False).ids
        while one and other and one[-1] == other[-1]:
            one, other = one[:-1], other[:-1]
        if len(one) > AT_THE_START or len(other) > AT_THE_START:
            yield text
