"""Byte-pair encoding in the form of tokenizer.json: models, decoders, and merges found again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.errors import ConfigError

MOST_MERGES = 2_000_000
"""The largest real vocabularies have some 600 thousand."""
SPACE = "\u2581"
"""How SentencePiece writes a space."""

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
"""The decoder of byte-level vocabularies."""


def spelled(token: str) -> str:
    """A token of Gemma as SentencePiece spells it: GGUF has runs of spaces as such."""
    return SPACE * len(token) if token and not token.strip(" ") else token


def gemma_parts(model: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json's parts for Gemma: spaces are spelled, and nothing is put before a text."""
    space = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {**space, "invert": False},
        "decoder": {"type": "Sequence", "decoders": _pieces()},
        "model": model,
    }


def llama_parts(model: dict[str, Any], prefix: bool) -> dict[str, Any]:
    """A tokenizer.json's parts for Llama 2 and Mistral.

    prefix: whether a text gets a space before it when it has none.
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
    """The model of a tokenizer.json.

    ignore_merges: a word that is a token stays whole. byte_fallback: what is no token is spelled in
    bytes, else `unknown` stands for it.
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
    """Merges that join pieces in the order of their scores, the best first.

    Each piece is joined from every pair of shorter ones that it consists of; among pairs of equal
    scores the one with the longer first part comes first.

    Raises: ConfigError when there are too many.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
        if len(found) > MOST_MERGES:
            raise ConfigError(f"A vocabulary is refused: it makes more than {MOST_MERGES} merges.")
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [entry[3:] for entry in found]
