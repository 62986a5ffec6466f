"""llama.cpp itself beside localrl: on a real GGUF file, and on the files that localrl writes.

llama.cpp rounds activations to 8 bits before every product with quantised weights, so that texts
part where two tokens are nearly as likely. Each text of its is looked at up to the first token that
is not the likeliest of our logits: how far that one lies below it, in logits, is the gap.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Answer, ask, smollm2

sys.path.insert(0, str(Path(__file__).parent.parent / "gguf"))

import tiny
from texts import texts
from written import write_model

from localrl.backend import mx
from localrl.engines.open import make_policy
from localrl.export.adapters import adapter_of, read_adapter
from localrl.export.gguf import export_gguf
from localrl.gguf.convert import as_folder
from localrl.gguf.families import to_halves
from localrl.policy.model import load_model
from localrl.policy.precision import dequantise, to_float32
from localrl.policy.tokenizer import Tokenizer, load_tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "What is 41 - 18? Reply with the number only.",
    "Name three colours.",
    "Write a haiku about rain.",
    "Who wrote Hamlet?",
    "Explain gravity in one sentence.",
    "Translate 'good morning' to Spanish.",
    "List the days of the week.",
    "What is photosynthesis?",
    "How many legs does a spider have?",
    "Give me a recipe for pancakes.",
    "What does DNA stand for?",
    "Is the sun a star?",
    "Write a function that adds two numbers in Python.",
    "What is the opposite of hot?",
    "Count from 1 to 10.",
    "Tell me a joke.",
    "What year did World War II end?",
    "Describe a cat.",
    "Why is the sky blue?",
)
NEAR = 1.0
"""Logits. Measured: at most 0.58 on SmolLM2, whose logits have a standard deviation of 6; 8.0 with
rows of one of its thirty blocks in the wrong order."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("converted")))
        yield


def dense(folder: Path) -> Any:
    """mlx-lm's own model, in float32."""
    model = load_model(folder).model
    dequantise(model, as_float32=True)
    to_float32(model)
    return model


def gap(model: Any, prompt: Sequence[int], text: Sequence[int]) -> float:
    """How far the first token of a text that is not our likeliest lies below it; 0: none is."""
    logits = np.array(model(mx.array([[*prompt, *text]])))[0, len(prompt) - 1 : -1]
    gaps = logits.max(-1) - logits[np.arange(len(text)), list(text)]
    parted = np.flatnonzero(gaps)
    return float(gaps[parted[0]]) if len(parted) else 0.0


def prompts_of(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    return [tokenizer.encode([{"role": "user", "content": text}]) for text in QUESTIONS]


@pytest.fixture(scope="module")
def folder() -> Path:
    return as_folder(smollm2(), print)


@pytest.fixture(scope="module")
def answer(folder: Path) -> Answer:
    return ask(smollm2(), prompts_of(load_tokenizer(folder)), texts())


def test_texts_of_smollm2_part_at_near_ties_only(folder: Path, answer: Answer) -> None:
    model, prompts = dense(folder), prompts_of(load_tokenizer(folder))
    gaps = [gap(model, *both) for both in zip(prompts, answer.greedy, strict=True)]
    print("gaps", [round(found, 3) for found in gaps])
    assert max(gaps) < NEAR
    assert sum(found == 0 for found in gaps) >= 5


def test_rows_in_the_wrong_order_would_be_found_out(folder: Path, answer: Answer) -> None:
    """Queries and keys of one block of thirty, permuted once more than they are to be."""
    model, prompts = dense(folder), prompts_of(load_tokenizer(folder))
    attention = model.layers[4].self_attn
    attention.q_proj.weight = to_halves(attention.q_proj.weight, 9)
    attention.k_proj.weight = to_halves(attention.k_proj.weight, 3)
    gaps = [gap(model, *both) for both in zip(prompts, answer.greedy, strict=True)]
    print("gaps", [round(found, 3) for found in gaps])
    assert max(gaps) > 2 * NEAR


def test_tokens_of_texts_are_those_of_llama_cpp(folder: Path, answer: Answer) -> None:
    tokenizer = load_tokenizer(folder)
    for text, tokens in zip(texts(), answer.tokens, strict=True):
        assert list(tokenizer.encode_text(text)) == tokens, repr(text)
    assert answer.eos in tokenizer.end_ids
    assert answer.template == tokenizer.inner.chat_template


# What localrl writes.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of SmolLM2 towards texts with many letters e."""
    place = tmp_path_factory.mktemp("trained")
    (place / "reward.py").write_text(
        "def letters(completions, **kwargs):\n"
        "    return [text.count('e') / max(1, len(text)) for text in completions]\n"
    )
    (place / "task.jsonl").write_text("".join(f'{{"prompt": "{q}"}}\n' for q in QUESTIONS[:8]))
    settings = {
        "task.eval_prompts": 0,
        "rollout.group_size": 4,
        "rollout.prompts_per_step": 2,
        "rollout.max_completion_tokens": 16,
        "learning.lr": 1e-2,
    }
    localrl(
        *("train", "--model", smollm2(), "--task", place / "task.jsonl", "--steps", 3),
        *("--reward", f"{place / 'reward.py'}:letters", "--out", place / "run"),
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    )
    return place / "run"


def localrl(*arguments: Any) -> str:
    command = [str(Path(sys.executable).with_name("localrl")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("bits", [8, 16])
def test_a_trained_run_answers_likewise_in_llama_cpp(folder: Path, run: Path, bits: int) -> None:
    """As the file read again, as base with adapter, and not as the base alone."""
    told = localrl("export", run, "--gguf", "--bits", bits)
    file = run / f"run.{'Q8_0' if bits == 8 else 'F16'}.gguf"
    assert f"to {file}" in told
    tokenizer = load_tokenizer(folder)
    prompts = prompts_of(tokenizer)
    found = ask(file, prompts, texts())
    again = dense(as_folder(file, print))
    gaps = [gap(again, *both) for both in zip(prompts, found.greedy, strict=True)]
    adapter = read_adapter(run / "adapter")
    policy = make_policy(
        load_model(folder),
        rank=adapter.rank,
        scale=adapter.scale,
        seed=0,
        for_cpu=True,
        dense=True,
        weights=adapter.weights,
    ).model
    trained = [gap(policy, *both) for both in zip(prompts, found.greedy, strict=True)]
    base = dense(folder)
    untrained = [gap(base, *both) for both in zip(prompts, found.greedy, strict=True)]
    for name, values in (("file", gaps), ("adapter", trained), ("base", untrained)):
        print(f"{bits} bits, {name}:", [round(value, 3) for value in values])
    assert max(gaps) < NEAR
    assert max(trained) < NEAR
    assert max(untrained) > NEAR  # what was learned is in the file
    assert found.tokens == [list(tokenizer.encode_text(text)) for text in texts()]
    assert found.template == tokenizer.inner.chat_template


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_family_is_read_by_llama_cpp(tmp_path: Path, architecture: str, bits: int) -> None:
    """Tiny random models, whose logits have a standard deviation of 0.8, Gemma's 1.6."""
    base = as_folder(write_model(tmp_path / "base.gguf", architecture, "F16").path, print)
    policy = make_policy(load_model(base), rank=4, scale=2.0, seed=0, for_cpu=True, dense=True)
    tiny.stir(policy.model, seed=1, size=0.05)
    made = export_gguf(adapter_of(policy.model), base, tmp_path / "out.gguf", bits=bits)
    draws, tokenizer = np.random.default_rng(0), load_tokenizer(base)
    prompts = [draws.integers(3, 260, 12).tolist() for _ in range(8)]
    # llama.cpp composes no characters, where Qwen's tokenizer does.
    plain = [text for text in texts() if architecture != "qwen2" or text.isascii()]
    found = ask(made.path, prompts, plain)
    again = dense(as_folder(made.path, print))
    gaps = [gap(again, *both) for both in zip(prompts, found.greedy, strict=True)]
    print(f"{architecture}, {bits} bits:", [round(value, 4) for value in gaps])
    assert max(gaps) < (0.01 if bits == 16 else 0.3)
    assert found.tokens == [list(tokenizer.encode_text(text)) for text in plain]
