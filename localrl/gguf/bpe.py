"""Byte-pair encoding in tokenizer.json format: models, decoders, and recovery of merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.errors import ConfigError

MOST_MERGES = 2_000_000
"""Maximum number of merges; the largest real vocabularies have about 600 thousand."""
SPACE = "\u2581"
"""Character that SentencePiece uses for a space."""

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
"""Decoder of byte-level vocabularies."""


def spelled(token: str) -> str:
    """Spell a token of Gemma as SentencePiece does; GGUF stores runs of spaces literally."""
    return SPACE * len(token) if token and not token.strip(" ") else token


def gemma_parts(model: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json parts for Gemma: spaces are spelled, nothing is prepended."""
    space = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {**space, "invert": False},
        "decoder": {"type": "Sequence", "decoders": _pieces()},
        "model": model,
    }


def llama_parts(model: dict[str, Any], prefix: bool) -> dict[str, Any]:
    """Return the tokenizer.json parts for Llama 2 and Mistral.

    prefix: prepend a space to a text that does not begin with one.
    """
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": [*_pieces(), *strip]},
        "model": model,
    }


def _pieces() -> list[dict[str, Any]]:
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]


def bpe(
    tokens: Sequence[str],
    pairs: Sequence[Sequence[str]],
    *,
    ignore_merges: bool = False,
    unknown: str | None = None,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    """Return the model of a tokenizer.json.

    ignore_merges: keep a word whole if it is a token. byte_fallback: spell unknown text in bytes;
    otherwise the token `unknown` replaces it.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": pairs,
    }


def merges_of(tokens: Sequence[str], scores: np.ndarray) -> list[tuple[str, str]]:
    """Return the merges that join pieces in the order of their scores, best first.

    Each piece is joined from every pair of shorter pieces that it consists of; among pairs with
    equal scores, the one with the longer first part comes first.

    Raises: ConfigError if there are too many.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
        if len(found) > MOST_MERGES:
            raise ConfigError(f"A vocabulary is refused: it needs more than {MOST_MERGES} merges.")
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [entry[3:] for entry in found]
