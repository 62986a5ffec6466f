"""Tokens of a GGUF's vocabulary are those of the tokenizer that it was made from."""

from __future__ import annotations

import io
import json
import time
import unicodedata

import numpy as np
import pytest
import regex
import sentencepiece
from texts import PIECES, texts
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
)
from written import SPECIAL, write_model

from localrl.errors import ConfigError
from localrl.gguf.bpe import merges_of
from localrl.gguf.convert import as_folder
from localrl.gguf.pretokenizers import PRETOKENIZERS
from localrl.policy.tokenizer import load_tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
QWEN = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer


def split(name):
    cut = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return pre_tokenizers.Sequence([cut, BYTES])


REFERENCES = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "gpt-2": GPT2,
    "qwen2": QWEN.pre_tokenizer,
    "deepseek-r1-qwen": QWEN.pre_tokenizer,
    **{name: split(name) for name in ("llama-bpe", "tekken", "gpt-4o")},
}


def train(pre, normalizer=None):
    """A byte-level tokenizer with some hundred merges, learned from the texts themselves."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PIECES * 3, trainer)
    return tokenizer


def metadata_of(tokenizer, pre):
    body = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(body["vocab"], key=body["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in body["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def folder_of(path, metadata, architecture="llama", rows=None):
    rows = rows or len(metadata["tokenizer.ggml.tokens"])
    config = {"vocab_size": rows, "num_hidden_layers": 1}
    return as_folder(write_model(path, architecture, config=config, extra=metadata).path, print)


def assert_same(tokenizer, reference, decodes=True):
    for text in texts():
        ids = list(tokenizer.encode_text(text))
        assert ids == reference(text), repr(text)
        if decodes and text and not any(token in text for token in SPECIAL):
            assert tokenizer.decode(ids) == text, repr(text)


@pytest.mark.parametrize("pre", REFERENCES)
def test_byte_level(tmp_path, pre):
    composed = normalizers.NFC() if pre == "qwen2" else None
    reference = train(REFERENCES[pre], composed)
    tokenizer = load_tokenizer(folder_of(tmp_path / "m.gguf", metadata_of(reference, pre)))
    assert_same(tokenizer, lambda text: reference.encode(text).ids, decodes=composed is None)
    assert tokenizer.end_ids == {2}


def test_expressions_are_those_of_the_models():
    known = [name for name in GGUF_PRE_TOKENIZER_SPLITS if name in PRETOKENIZERS]
    assert len(known) > 10
    for name in known:
        assert PRETOKENIZERS[name].cuts == (GGUF_PRE_TOKENIZER_SPLITS[name],)


def test_default_cuts_as_llama_cpp_does():
    """Each expression cuts what the one before it has left, matches and gaps alike."""
    found = PRETOKENIZERS["default"]
    parts = json.dumps(
        {"pre_tokenizer": {**found.json(), "pretokenizers": found.json()["pretokenizers"][:-1]}}
    )
    whole = {**json.loads(Tokenizer(BPE()).to_str()), **json.loads(parts)}
    cutter = Tokenizer.from_str(json.dumps(whole)).pre_tokenizer
    for text in texts():
        words = [text] if text else []
        for expression in found.cuts:
            words = [cut for word in words for cut in cuts(expression, word)]
        assert [word for word, _ in cutter.pre_tokenize_str(text)] == words


def cuts(expression, word):
    at = 0
    for match in regex.finditer(expression, word):
        if match.start() > at:
            yield word[at : match.start()]
        if match.end() > match.start():
            yield match.group()
        at = match.end()
    if at < len(word):
        yield word[at:]


def test_begin_tokens(tmp_path):
    reference = train(REFERENCES["llama-bpe"])
    metadata = metadata_of(reference, "llama-bpe")
    begun = load_tokenizer(folder_of(tmp_path / "a.gguf", metadata))
    assert begun.inner.encode("hi")[0] == 1
    metadata["tokenizer.ggml.add_bos_token"] = False
    plain = load_tokenizer(folder_of(tmp_path / "b.gguf", metadata))
    assert plain.inner.encode("hi") == list(begun.encode_text("hi"))


def test_end_tokens_of_all_keys_and_names(tmp_path):
    metadata = metadata_of(train(GPT2), "gpt-2")
    metadata |= {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 300}
    tokenizer = load_tokenizer(folder_of(tmp_path / "a.gguf", metadata))
    assert tokenizer.end_ids == {0, 300, 2}  # 2 is <|im_end|>


def sentences(prefix, user=()):
    """A SentencePiece model with byte fallback, learned from the texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for piece in PIECES[:12] * 3 for line in piece.split("\n")]),
        model_writer=model,
        model_type="bpe",
        vocab_size=620,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=list(user),
        character_coverage=0.98,
        hard_vocab_limit=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentence_metadata(model, user=()):
    """As llama.cpp's conversion writes a SentencePiece model."""
    tokens, scores, types = [], [], []
    for i in range(model.get_piece_size()):
        kind = 1
        token = model.id_to_piece(i)
        if model.is_unknown(i):
            kind = 2
        elif model.is_control(i):
            kind = 3
        elif model.is_byte(i):
            kind = 6
        elif token in user:
            kind, token = 4, token.replace("\u2581", " ")
        tokens.append(token)
        scores.append(model.get_score(i))
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def of_transformers(architecture, metadata):
    """The tokenizer that transformers makes of the same metadata."""
    names = {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
    }
    given = {theirs: metadata.get(f"tokenizer.ggml.{ours}") for ours, theirs in names.items()}
    given = {name: value for name, value in given.items() if value is not None}
    return convert_gguf_tokenizer(architecture, given)[0]


def test_sentencepiece(tmp_path):
    model = sentences(prefix=True)
    metadata = sentence_metadata(model)
    tokenizer = load_tokenizer(folder_of(tmp_path / "m.gguf", metadata))
    reference = of_transformers("llama", metadata)
    assert_same(tokenizer, lambda text: reference.encode(text, add_special_tokens=False).ids, False)
    # SentencePiece itself adds a space also where there is one already; transformers does not.
    for text in (text for text in texts() if text.strip() and text[0] not in " \u2581"):
        ids = model.encode(text)
        assert list(tokenizer.encode_text(text)) == ids, repr(text)
        assert tokenizer.decode(ids) == model.decode(ids)
    assert tokenizer.inner.encode("hi") == [1, *model.encode("hi")]


def test_sentencepiece_without_a_prefix(tmp_path):
    model = sentences(prefix=False)
    metadata = {**sentence_metadata(model), "tokenizer.ggml.add_space_prefix": False}
    tokenizer = load_tokenizer(folder_of(tmp_path / "m.gguf", metadata))
    assert_same(tokenizer, model.encode)


def test_gemma(tmp_path):
    user = [*("\u2581" * n for n in range(2, 12)), "<start_of_turn>"]
    model = sentences(prefix=False, user=user)
    metadata = sentence_metadata(model, user)
    tokenizer = load_tokenizer(folder_of(tmp_path / "m.gguf", metadata, "gemma3"))
    for text in (text for text in texts() if not any(token in text for token in SPECIAL)):
        assert list(tokenizer.encode_text(text)) == model.encode(text), repr(text)
    reference = of_transformers("gemma3", metadata)
    assert_same(tokenizer, lambda text: reference.encode(text, add_special_tokens=False).ids, False)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_byte_level_is_as_in_transformers(tmp_path, pre):
    metadata = metadata_of(train(split(pre)), pre)
    metadata["tokenizer.ggml.token_type"][-3:] = [4, 4, 4]  # found in a text before all merges
    architecture = "qwen2" if pre == "qwen2" else "llama"
    tokenizer = load_tokenizer(folder_of(tmp_path / "m.gguf", metadata, architecture))
    reference = of_transformers(architecture, metadata)

    def encode(text):
        if pre == "qwen2":  # as the model's own tokenizer.json, and Qwen2Tokenizer
            text = unicodedata.normalize("NFC", text)
        return reference.encode(text, add_special_tokens=False).ids

    assert_same(tokenizer, encode, decodes=False)


def test_no_other_tokenizer_for_qwen2(tmp_path):
    """transformers would pass over it and take Qwen's."""
    with pytest.raises(ConfigError, match="not that of Qwen 2"):
        folder_of(tmp_path / "m.gguf", metadata_of(train(GPT2), "gpt-2"), "qwen2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "wordpiece"}, "'wordpiece'; gpt2 and llama are supported"),
        ({"pre": "quux"}, "'quux' is unknown; known are default"),
        ({"pre": None}, "names no pre-tokenizer"),
        ({"tokens": None}, "no list of tokens"),
        ({"tokens": ["a"] * 500}, "are the same"),
        ({"tokens": ["a" * 600]}, "too long"),
        ({"token_type": [1, 1]}, "2 token types"),
        ({"merges": None}, "no merges"),
        ({"merges": ["a b c"]}, "not a pair"),
        ({"merges": ["qq zz"]}, "is not a valid tokenizer"),
        ({"eos_token_id": 10_000}, "eos_token_id is 10000"),
        ({"model": "llama", "scores": [0.5]}, "no score for each"),
    ],
)
def test_vocabularies_that_are_not_sound(tmp_path, change, message):
    metadata = metadata_of(train(GPT2), "gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        as_folder(
            write_model(tmp_path / "m.gguf", config={"vocab_size": 500}, extra=metadata).path, print
        )


def test_no_end_token(tmp_path):
    metadata = metadata_of(train(GPT2), "gpt-2")
    del metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.ggml.tokens"][2] = "<other>"
    with pytest.raises(ConfigError, match="names no end token"):
        as_folder(
            write_model(tmp_path / "m.gguf", config={"vocab_size": 500}, extra=metadata).path, print
        )


def test_merges_of_long_tokens_are_found_in_bounded_time():
    tokens = ["ab" * 128 + f"{i:05d}" * 50 for i in range(5_000)]
    start = time.monotonic()
    assert merges_of(tokens, np.zeros(len(tokens))) == []
    assert time.monotonic() - start < 30
