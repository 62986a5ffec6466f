"""A tokenizer.json becomes metadata from which the same tokenizer is read."""

from __future__ import annotations

import json

import pytest
from test_tokenizer import REFERENCES, folder_of, metadata_of, sentence_metadata, sentences, train
from texts import texts
from tokenizers import normalizers
from written import SPECIAL

from localrl.errors import ConfigError
from localrl.gguf.families import FAMILIES
from localrl.gguf.vocabulary import Special, tokenizer_metadata
from localrl.policy.tokenizer import load_tokenizer

LLAMA, GEMMA = FAMILIES["llama"], FAMILIES["gemma3"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written_again(content, family=LLAMA, **special):
    given = Special(**{"ends": (2,), "begin": 1, **special})
    rows = 1 + max(content["model"]["vocab"].values())
    return tokenizer_metadata(content, given, family, rows)


@pytest.mark.parametrize("pre", REFERENCES)
def test_byte_level(tmp_path, pre):
    reference = train(REFERENCES[pre], normalizers.NFC() if pre == "qwen2" else None)
    content = json.loads(reference.to_str())
    content["model"]["ignore_merges"] = pre in ("llama-bpe", "tekken")
    metadata = written_again(content)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.merges"] == metadata_of(reference, pre)["tokenizer.ggml.merges"]
    tokenizer = load_tokenizer(folder_of(tmp_path / "m.gguf", metadata))
    for text in texts():
        assert list(tokenizer.encode_text(text)) == reference.encode(text).ids, repr(text)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    model = sentences(prefix=prefix)
    metadata = {**sentence_metadata(model), "tokenizer.ggml.add_space_prefix": prefix}
    folder = folder_of(tmp_path / "a.gguf", metadata)
    again = written_again(json.loads((folder / "tokenizer.json").read_text()), unknown=0)
    for key in ("tokens", "token_type", "add_space_prefix"):
        assert again[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    one, other = load_tokenizer(folder), load_tokenizer(folder_of(tmp_path / "b.gguf", again))
    for text in texts():
        assert one.encode_text(text) == other.encode_text(text), repr(text)


def test_gemma(tmp_path):
    user = [*("\u2581" * n for n in range(2, 12)), "<start_of_turn>"]
    metadata = sentence_metadata(sentences(prefix=False, user=user), user)
    folder = folder_of(tmp_path / "a.gguf", metadata, "gemma3")
    again = written_again(json.loads((folder / "tokenizer.json").read_text()), GEMMA, unknown=0)
    for key in ("tokens", "token_type"):
        assert again[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    one = load_tokenizer(folder)
    other = load_tokenizer(folder_of(tmp_path / "b.gguf", again, "gemma3"))
    for text in texts():
        assert one.encode_text(text) == other.encode_text(text), repr(text)


def test_rows_without_a_token_are_named_and_tokens_without_a_row_refused():
    content = json.loads(train(REFERENCES["gpt-2"]).to_str())
    count = len(content["model"]["vocab"])
    found = tokenizer_metadata(content, Special(ends=(2,)), LLAMA, count + 2)
    assert found["tokenizer.ggml.tokens"][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert found["tokenizer.ggml.token_type"][count:] == [5, 5]
    assert found["tokenizer.ggml.tokens"][:3] == list(SPECIAL)
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    with pytest.raises(ConfigError, match=f"the token {count - 1}"):
        tokenizer_metadata(content, Special(ends=(2,)), LLAMA, count - 1)


def test_end_tokens():
    content = json.loads(train(REFERENCES["gpt-2"]).to_str())
    found = written_again(content, ends=(2, 0, 7))
    names = ("eos", "eot", "eom")
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in names] == [2, 0, 7]
    for ends in ((), (1, 2, 3, 4)):
        with pytest.raises(ConfigError, match=f"{len(ends)} end tokens"):
            written_again(content, ends=ends)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalises text with"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
            "prepends a space",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
            "splits text with",
        ),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(change, message):
    content = {**json.loads(train(REFERENCES["gpt-2"]).to_str()), **change}
    with pytest.raises(ConfigError, match=message):
        written_again(content)
