"""Conversion of a model's tokenizer.json to GGUF metadata.

The inverse of `tokenizer`: a tokenizer whose tokens llama.cpp would not reproduce is refused, not
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrl.errors import ConfigError
from localrl.gguf.families import GGUFFamily
from localrl.gguf.pretokenizers import PRETOKENIZERS, Pretokenizer
from localrl.gguf.tokenizer import CONTROL, SPACE, UNKNOWN, USER

NORMAL, UNUSED, BYTE = 1, 5, 6
"""Other types of tokens, see UNKNOWN, CONTROL and USER."""
INSTEAD = (
    "Use --fused: transformers and mlx-lm read the folder, and llama.cpp's own "
    "convert_hf_to_gguf.py may support this tokenizer."
)


@dataclass(frozen=True)
class Special:
    """Special tokens of a model's tokenizer."""

    ends: tuple[int, ...]
    """Ids of tokens that end a completion, the tokenizer's own end token first."""
    begin: int | None = None
    padding: int | None = None
    unknown: int | None = None
    begins: bool = False
    """True if plain text is prefixed with the begin token."""
    template: str | None = None
    """The chat template."""


def tokenizer_metadata(
    tokenizer: Mapping[str, Any], special: Special, family: GGUFFamily, rows: int
) -> dict[str, Any]:
    """Build the tokenizer metadata of a file.

    tokenizer: content of tokenizer.json. rows: rows of the embedding.

    Raises: ConfigError for a tokenizer without an equivalent in llama.cpp.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')!r:.40}, not BPE")
    odd = [n for n in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(n)]
    if odd:
        raise _unknown(f"it has {odd[0]} {model[odd[0]]!r:.40}")
    tokens, types = _tokens(tokenizer, rows)
    if model.get("byte_fallback"):
        own = _sentencepiece(tokenizer, tokens, types, family)
    else:
        own = _byte_level(tokenizer)
    return {
        **own,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special(special),
    }


def _tokens(tokenizer: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return a text and a type per embedding row; rows without a token are named [PADi]."""
    vocabulary: Mapping[str, int] = tokenizer["model"]["vocab"]
    added = tokenizer.get("added_tokens") or []
    largest = max([*vocabulary.values(), *(entry["id"] for entry in added)])
    if largest >= rows:
        raise _unknown(f"it has the token {largest}, but the model has embeddings for {rows}")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    unknown = tokenizer["model"].get("unk_token")
    for entry in added:
        i, token = entry["id"], entry["content"]
        kind = CONTROL if entry.get("special") else USER
        tokens[i], types[i] = token, UNKNOWN if token == unknown else kind
    return tokens, types


def _special(special: Special) -> dict[str, Any]:
    names = ("eos", "eot", "eom")
    if not 0 < len(special.ends) <= len(names):
        raise _unknown(f"it has {len(special.ends)} end tokens, but GGUF has room for 3")
    ids = {f"{name}_token_id": i for name, i in zip(names, special.ends, strict=False)}
    ids |= {"bos_token_id": special.begin, "padding_token_id": special.padding}
    ids |= {"unknown_token_id": special.unknown, "add_bos_token": special.begins}
    found: dict[str, Any] = {
        f"tokenizer.ggml.{name}": i for name, i in ids.items() if i is not None
    }
    if special.template is not None:
        found["tokenizer.chat_template"] = special.template
    return found


def _byte_level(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pretokenizer_name(tokenizer),
        "tokenizer.ggml.merges": merges,
    }


def pretokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer.json splits text into words.

    Raises: ConfigError if it has none.
    """
    composed = _steps(tokenizer.get("normalizer"), "normalizers")
    if composed not in ([], [{"type": "NFC"}]):
        raise _unknown(f"it normalises text with {composed!r:.200}")
    cuts, gpt2 = _cuts(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    wanted = (cuts, gpt2, bool(tokenizer["model"].get("ignore_merges")))
    names = [name for name, found in PRETOKENIZERS.items() if _way(found) == wanted]
    names.sort(key=lambda name: PRETOKENIZERS[name].composed != bool(composed))
    if not names:
        raise _unknown(f"it splits text with {tokenizer.get('pre_tokenizer')!r:.300}")
    return names[0]


def _way(found: Pretokenizer) -> tuple[tuple[str, ...], bool, bool]:
    """Return the properties that determine tokens. llama.cpp never composes characters."""
    return found.cuts, found.gpt2, found.whole_words


def _cuts(steps: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], bool]:
    """Return the expressions that split text, and True if GPT-2's own is applied last."""
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        raise _unknown("its pre-tokenizer is not byte-level, or prepends a space to text")
    cuts = []
    for step in steps[:-1]:
        pattern = step.get("pattern") or {}
        if step.get("type") == "Digits" and step.get("individual_digits"):
            cuts.append(r"\p{N}")
        elif (step.get("type"), step.get("behavior")) == ("Split", "Isolated") and (
            "Regex" in pattern and not step.get("invert")
        ):
            cuts.append(pattern["Regex"])
        else:
            raise _unknown(f"it splits text with {step!r:.200}")
    return tuple(cuts), bool(steps[-1].get("use_regex", True))


def _steps(part: Any, members: str) -> list[Any]:
    """List the steps of a part of tokenizer.json, which may be one step or a sequence."""
    if part is None:
        return []
    return list(part[members]) if part.get("type") == "Sequence" else [part]


def _sentencepiece(
    tokenizer: Mapping[str, Any], tokens: list[str], types: list[int], family: GGUFFamily
) -> dict[str, Any]:
    """Return SentencePiece metadata with scores from the merge order; fix types and tokens in
    place."""
    prefix = _puts_space_first(tokenizer)
    if prefix and family.architecture == "gemma3":
        raise _unknown("it prepends a space to text, unlike Gemma's")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    scores = [-float(ranks.get(token, len(ranks) + i)) for i, token in enumerate(tokens)]
    for i, token in enumerate(tokens):
        if types[i] == USER:  # llama.cpp matches them in the raw text
            tokens[i] = token.replace(SPACE, " ")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_BEFORE = {"type": "Prepend", "prepend": SPACE}


def _puts_space_first(tokenizer: Mapping[str, Any]) -> bool:
    """Return True if a SentencePiece tokenizer prepends a space to text.

    Raises: ConfigError if it does not treat spaces as llama.cpp does.
    """
    before = _steps(tokenizer.get("normalizer"), "normalizers")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if before in ([_SPACES], [_BEFORE, _SPACES]) and kinds in ([], ["Split"]):
        if not steps or steps[0].get("pattern") == {"String": " "}:
            return _BEFORE in before
    elif not before and kinds == ["Metaspace"] and steps[0].get("replacement") == SPACE:
        return steps[0].get("prepend_scheme", "always") != "never"
    raise _unknown(f"it treats spaces with {before!r:.150} and {steps!r:.150}")


def _unknown(reason: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp has no equivalent of this model's tokenizer: {reason}. {INSTEAD}"
    )
