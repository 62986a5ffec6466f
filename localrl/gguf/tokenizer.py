"""From the vocabulary in a GGUF file's metadata to the files of a tokenizer beside a model.

llama.cpp names two kinds that the families here have: byte-level BPE ("gpt2"), whose text is cut by
a named pre-tokenizer first, and SentencePiece ("llama"), which becomes BPE with byte fallback, its
merges found again from the pieces and their scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.errors import ConfigError
from localrl.gguf.bpe import (
    BYTE_LEVEL,
    MOST_MERGES,
    SPACE,
    bpe,
    gemma_parts,
    llama_parts,
    merges_of,
    spelled,
)
from localrl.gguf.pretokenizers import PRETOKENIZERS, Pretokenizer, find_pretokenizer
from localrl.gguf.reader import GGUF, refused

UNKNOWN, CONTROL, USER = 2, 3, 4
"""Types of tokens that are looked for in a text before anything else; 1 is a plain one."""
MOST_TOKENS = 1_000_000
MOST_TOKEN = 512
"""Characters of one token; runs of spaces are the longest, of some 128."""
MOST_CHARACTERS = 16_000_000
"""Of all tokens; the largest vocabularies have some 2 million."""
MOST_BYTES = 64_000_000
"""Of tokenizer.json: as much as is read of one."""
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
"""Tokens that end a turn wherever they are: not every file names one as its end token."""
_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer is made of."""

    tokenizer: dict[str, Any]
    """tokenizer.json."""
    config: dict[str, Any]
    """tokenizer_config.json, the chat template included."""
    ids: dict[str, int | list[int]]
    """Ids of the end tokens, the begin token and the padding, as config.json names them."""


def read_tokenizer(file: GGUF, vocabulary: int, context: int) -> TokenizerFiles:
    """The tokenizer of a file; vocabulary: rows of the embedding; context: tokens at most.

    Raises: ConfigError when its kind or its pre-tokenizer is not known, or when it is not sound.
    """
    vocab = _vocabulary(file, vocabulary)
    kind = file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        body = _byte_level(file, vocab)
    elif kind == "llama":
        body = _sentencepiece(file, vocab)
    else:
        raise refused(
            file.path, f"its tokenizer is of the kind {kind!r:.40}; there are gpt2 and llama"
        )
    ids = {name: vocab.id_of(file, key) for name, key in _IDS.items()}
    begins = file.get("tokenizer.ggml.add_bos_token", bool, body.begins)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocab.added(),
        **body.parts,
        "post_processor": _begin(vocab, ids["bos_token"]) if begins else None,
    }
    _try(file, tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{name: vocab.tokens[number] for name, number in ids.items() if number is not None},
    }
    if (unknown := vocab.id_of(file, "unknown_token_id")) is not None:
        config["unk_token"] = vocab.tokens[unknown]
    if (template := file.get("tokenizer.chat_template", str)) is not None:
        config["chat_template"] = template
    return TokenizerFiles(tokenizer, config, _special_ids(file, vocab, ids))


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by their ids, all different, and what each of them is."""

    tokens: list[str]
    types: np.ndarray
    """(tokens,) int: see UNKNOWN, CONTROL and USER."""

    def id_of(self, file: GGUF, key: str) -> int | None:
        """The id that a key of the metadata names; None where it is absent."""
        found = file.get(f"tokenizer.ggml.{key}", int)
        if found is not None and not 0 <= found < len(self.tokens):
            raise refused(
                file.path,
                f"its tokenizer.ggml.{key} is {found}, and there are {len(self.tokens)} tokens",
            )
        return found

    def added(self) -> list[dict[str, Any]]:
        """Tokens that a text is searched for as they are, in the form of tokenizer.json."""
        chosen = np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL, USER)))
        return [
            {
                "id": int(i),
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": bool(self.types[i] != USER),
            }
            for i in chosen
            if self.tokens[i].strip() or SPACE not in self.tokens[i]
        ]


@dataclass(frozen=True)
class _Body:
    """The parts of a tokenizer.json that depend on its kind."""

    parts: dict[str, Any]
    begins: bool
    """Whether a text begins with the begin token unless the file says otherwise."""


def _vocabulary(file: GGUF, rows: int) -> _Vocabulary:
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise refused(file.path, "it has no list of tokens (tokenizer.ggml.tokens)")
    if len(tokens) > min(rows, MOST_TOKENS):
        raise refused(file.path, f"it has {len(tokens)} tokens and {rows} rows of embeddings")
    if max(map(len, tokens)) > MOST_TOKEN or sum(map(len, tokens)) > MOST_CHARACTERS:
        raise refused(
            file.path,
            f"its tokens are too long: at most {MOST_TOKEN} characters of one and "
            f"{MOST_CHARACTERS} of all are read",
        )
    types = file.get("tokenizer.ggml.token_type", np.ndarray)
    if types is None:
        types = np.ones(len(tokens), np.int32)
    if len(types) != len(tokens) or types.dtype.kind not in "iu":
        raise refused(file.path, f"it has {len(types)} token types for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        raise refused(file.path, "two of its tokens are the same")
    return _Vocabulary(tokens, types)


def _byte_level(file: GGUF, vocab: _Vocabulary) -> _Body:
    name = file.get("tokenizer.ggml.pre", str)
    found = find_pretokenizer(file.path, name)
    _check_class(file, found)
    merges = file.get("tokenizer.ggml.merges", list)
    if merges is None:
        raise refused(file.path, "it has no merges (tokenizer.ggml.merges)")
    if len(merges) > MOST_MERGES:
        raise refused(file.path, f"it has {len(merges)} merges; at most {MOST_MERGES} are read")
    pairs = [merge.split(" ") if isinstance(merge, str) else [] for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise refused(file.path, "one of its merges is no pair of tokens")
    model = bpe(vocab.tokens, pairs, ignore_merges=found.whole_words)
    parts = {
        "normalizer": {"type": "NFC"} if found.composed else None,
        "pre_tokenizer": found.json(),
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    return _Body(parts, found.begins)


def _check_class(file: GGUF, found: Pretokenizer | None) -> None:
    """Raises: ConfigError when transformers would cut texts in another way than the file says.

    It gives every qwen2 model Qwen's own tokenizer, whatever tokenizer.json holds.
    """
    own = PRETOKENIZERS["qwen2"].cuts
    if file.metadata.get("general.architecture") == "qwen2" and (not found or found.cuts != own):
        raise refused(
            file.path, "it is of the family qwen2, and its tokenizer is not that of Qwen 2"
        )


def _sentencepiece(file: GGUF, vocab: _Vocabulary) -> _Body:
    _check_class(file, None)
    scores = file.get("tokenizer.ggml.scores", np.ndarray)
    if scores is None or len(scores) != len(vocab.tokens):
        raise refused(file.path, "it has no score for each of its tokens (tokenizer.ggml.scores)")
    is_gemma = str(file.metadata.get("general.architecture", "")).startswith("gemma")
    if is_gemma:
        # Its runs of spaces are stored as such; and its merges follow the order of its tokens.
        vocab.tokens[:] = [spelled(token) for token in vocab.tokens]
        if len(set(vocab.tokens)) != len(vocab.tokens):
            raise refused(file.path, "two of its tokens are the same")
        scores = -np.arange(len(vocab.tokens))
    pairs = merges_of(vocab.tokens, scores)
    unknown = np.flatnonzero(vocab.types == UNKNOWN)
    token = vocab.tokens[unknown[0]] if len(unknown) else None
    model = bpe(vocab.tokens, pairs, unknown=token, byte_fallback=True)
    prefix = not is_gemma and file.get("tokenizer.ggml.add_space_prefix", bool, True)
    return _Body(gemma_parts(model) if is_gemma else llama_parts(model, prefix), True)


def _begin(vocab: _Vocabulary, begin: int | None) -> dict[str, Any] | None:
    """A post-processor that puts the begin token before a text."""
    if begin is None:
        return None
    token = vocab.tokens[begin]
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {token: {"id": token, "ids": [begin], "tokens": [token]}},
    }


def _special_ids(
    file: GGUF, vocab: _Vocabulary, ids: Mapping[str, int | None]
) -> dict[str, int | list[int]]:
    """Raises: ConfigError when there is no end token: nothing would stop."""
    control = set(np.flatnonzero(vocab.types == CONTROL).tolist())
    named = [ids["eos_token"], *(vocab.id_of(file, f"{n}_token_id") for n in ("eot", "eom"))]
    known = [i for i in sorted(control) if vocab.tokens[i] in ENDS]
    ends = list(dict.fromkeys(i for i in [*named, *known] if i is not None))
    if not ends:
        raise refused(file.path, "it names no end token, so nothing would stop")
    found: dict[str, int | list[int]] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    for name in ("bos_token", "pad_token"):
        if (number := ids[name]) is not None:
            found[f"{name}_id"] = number
    return found


def _try(file: GGUF, tokenizer: Mapping[str, Any]) -> None:
    """Raises: ConfigError when the library cannot make a tokenizer of it."""
    from tokenizers import Tokenizer

    text = json.dumps(tokenizer, ensure_ascii=False)
    if len(text.encode()) > MOST_BYTES:
        raise refused(file.path, f"its vocabulary would make more than {MOST_BYTES} bytes of JSON")
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare exceptions
        raise ConfigError(
            f"{file.path} is refused: its vocabulary makes no tokenizer ({error!s:.200})."
        ) from None
