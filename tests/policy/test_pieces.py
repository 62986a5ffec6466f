"""The text that each token adds, for tokenizers that cut characters into bytes or hide spaces."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from localrl.policy.tokenizer import Tokenizer

SMILE = "\U0001f642"


@pytest.fixture(scope="module")
def bytewise():
    """A byte-level BPE with a token for each byte and one for " a"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "Ġa", "<end>"])}
    raw = Raw(models.BPE(vocabulary, [("Ġ", "a")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    inner = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    return Tokenizer(inner, frozenset({vocabulary["<end>"]}))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a a\n", ["a", " a", "\n"]),
        ("é", ["", "é"]),
        (f"x{SMILE}{SMILE}y", ["x", "", "", "", SMILE, "", "", "", SMILE, "y"]),
        ("<end>", ["<end>"]),
    ],
)
def test_characters_of_several_tokens_come_with_the_last(bytewise, text, pieces):
    ids = bytewise.encode_text(text)
    assert bytewise.pieces(ids) == pieces
    assert "".join(pieces) == text


def test_bytes_that_are_no_character_are_told(bytewise):
    smile = bytewise.encode_text(SMILE)
    letter = bytewise.encode_text("a")
    assert bytewise.pieces(smile[:2]) == ["", "\ufffd"]
    assert bytewise.pieces([*smile[:2], *letter]) == ["", "\ufffd", "a"]
    assert bytewise.pieces([]) == []


def test_nothing_is_waited_for_without_end(bytewise):
    lead = bytewise.encode_text("é")[0]
    pieces = bytewise.pieces([lead] * 20)
    assert [i for i, piece in enumerate(pieces) if piece] == [7, 15, 19]
    assert "".join(pieces) == "\ufffd" * 20


def test_spaces_that_a_decoder_takes_away_are_there():
    raw = Raw(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    raw.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), frozenset({3}))
    assert tokenizer.decode([0, 1, 2]) == "the cats"
    assert tokenizer.pieces([0, 1, 2]) == [" the", " cat", "s"]
