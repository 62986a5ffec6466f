"""Conversion of the vocabulary in GGUF metadata to a model's tokenizer files.

The families here use two kinds in llama.cpp: byte-level BPE ("gpt2"), whose text is first split by
a named pre-tokenizer, and SentencePiece ("llama"), which becomes BPE with byte fallback, its merges
recovered from the pieces and their scores.
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
"""Types of tokens that are matched in a text before anything else; 1 is a normal token."""
MOST_TOKENS = 1_000_000
MOST_TOKEN = 512
"""Maximum characters of one token; runs of spaces are the longest, about 128."""
MOST_CHARACTERS = 16_000_000
"""Maximum characters of all tokens; the largest vocabularies have about 2 million."""
MOST_BYTES = 64_000_000
"""Maximum bytes of tokenizer.json, the same as when one is read."""
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
"""Tokens that always end a turn; not every file names them as end tokens."""
_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of a tokenizer's files."""

    tokenizer: dict[str, Any]
    """Content of tokenizer.json."""
    config: dict[str, Any]
    """Content of tokenizer_config.json, including the chat template."""
    ids: dict[str, int | list[int]]
    """Ids of the end, begin and padding tokens, by their config.json keys."""


def read_tokenizer(file: GGUF, vocabulary: int, context: int) -> TokenizerFiles:
    """Read the tokenizer of a file.

    vocabulary: rows of the embedding. context: maximum number of tokens.

    Raises: ConfigError if its kind or pre-tokenizer is unknown, or if it is invalid.
    """
    vocab = _vocabulary(file, vocabulary)
    kind = file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        body = _byte_level(file, vocab)
    elif kind == "llama":
        body = _sentencepiece(file, vocab)
    else:
        raise refused(
            file.path, f"its tokenizer is of kind {kind!r:.40}; gpt2 and llama are supported"
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
    """Tokens by id, all different, with their types."""

    tokens: list[str]
    types: np.ndarray
    """(tokens,) int, see UNKNOWN, CONTROL and USER."""

    def id_of(self, file: GGUF, key: str) -> int | None:
        """Return the token id in a metadata key; None if it is absent."""
        found = file.get(f"tokenizer.ggml.{key}", int)
        if found is not None and not 0 <= found < len(self.tokens):
            raise refused(
                file.path,
                f"its tokenizer.ggml.{key} is {found}, but there are {len(self.tokens)} tokens",
            )
        return found

    def added(self) -> list[dict[str, Any]]:
        """Return the tokens matched literally in a text, in tokenizer.json format."""
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
    """True if text begins with the begin token, unless the file says otherwise."""


def _vocabulary(file: GGUF, rows: int) -> _Vocabulary:
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise refused(file.path, "it has no list of tokens (tokenizer.ggml.tokens)")
    if len(tokens) > min(rows, MOST_TOKENS):
        raise refused(file.path, f"it has {len(tokens)} tokens, but {rows} rows of embeddings")
    if max(map(len, tokens)) > MOST_TOKEN or sum(map(len, tokens)) > MOST_CHARACTERS:
        raise refused(
            file.path,
            f"its tokens are too long: at most {MOST_TOKEN} characters per token and "
            f"{MOST_CHARACTERS} in total are read",
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
        raise refused(file.path, "one of its merges is not a pair of tokens")
    model = bpe(vocab.tokens, pairs, ignore_merges=found.whole_words)
    parts = {
        "normalizer": {"type": "NFC"} if found.composed else None,
        "pre_tokenizer": found.json(),
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    return _Body(parts, found.begins)


def _check_class(file: GGUF, found: Pretokenizer | None) -> None:
    """Check that transformers would split texts as the file says.

    transformers gives every qwen2 model Qwen's own tokenizer, whatever is in tokenizer.json.

    Raises: ConfigError if it would not.
    """
    own = PRETOKENIZERS["qwen2"].cuts
    if file.metadata.get("general.architecture") == "qwen2" and (not found or found.cuts != own):
        raise refused(
            file.path, "it is of the family qwen2, but its tokenizer is not that of Qwen 2"
        )


def _sentencepiece(file: GGUF, vocab: _Vocabulary) -> _Body:
    _check_class(file, None)
    scores = file.get("tokenizer.ggml.scores", np.ndarray)
    if scores is None or len(scores) != len(vocab.tokens):
        raise refused(file.path, "it has no score for each of its tokens (tokenizer.ggml.scores)")
    is_gemma = str(file.metadata.get("general.architecture", "")).startswith("gemma")
    if is_gemma:
        # Its runs of spaces are stored literally, and its merges follow the order of its tokens.
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
    """Return a post-processor that prepends the begin token, or None."""
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
    """Return the ids of special tokens by their config.json keys.

    Raises: ConfigError if there is no end token, because sampling would not stop.
    """
    control = set(np.flatnonzero(vocab.types == CONTROL).tolist())
    named = [ids["eos_token"], *(vocab.id_of(file, f"{n}_token_id") for n in ("eot", "eom"))]
    known = [i for i in sorted(control) if vocab.tokens[i] in ENDS]
    ends = list(dict.fromkeys(i for i in [*named, *known] if i is not None))
    if not ends:
        raise refused(file.path, "it names no end token, so sampling would not stop")
    found: dict[str, int | list[int]] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    for name in ("bos_token", "pad_token"):
        if (number := ids[name]) is not None:
            found[f"{name}_id"] = number
    return found


def _try(file: GGUF, tokenizer: Mapping[str, Any]) -> None:
    """Check that the library accepts the tokenizer.

    Raises: ConfigError if it does not.
    """
    from tokenizers import Tokenizer

    text = json.dumps(tokenizer, ensure_ascii=False)
    if len(text.encode()) > MOST_BYTES:
        raise refused(file.path, f"its vocabulary would take more than {MOST_BYTES} bytes of JSON")
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare exceptions
        raise ConfigError(
            f"{file.path} is refused: its vocabulary is not a valid tokenizer ({error!s:.200})."
        ) from None
