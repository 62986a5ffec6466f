"""The model that talks in turns is what its card says: small, able, and mostly wrong."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

from localrl.embedded import embedded_model_path
from localrl.policy.model import Policy
from localrl.policy.tokenizer import Tokenizer
from localrl.tasks.builtin import load_task

sys.path.append(str(Path(__file__).parents[1] / "models"))

from check_turns import CALL, HEED, Talk, load_policy, reply, talk
from talks import training_talk

from localrl.tasks.calculator_tool import Calculator

FOLDER = embedded_model_path("turns-0.1m")
USER = {"role": "user", "content": "What is 47 times 85?"}
CALLED = {
    "role": "assistant",
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "calculate", "arguments": {"expression": "47*85"}},
        }
    ],
}
RESULT = {"role": "tool", "content": "3995"}
CALL_TEXT = '<tool_call>{"name": "calculate", "arguments": {"expression": "47*85"}}</tool_call>'


@cache
def policy() -> Policy:
    return load_policy(FOLDER)


def tokenizer() -> Tokenizer:
    return policy().tokenizer


@cache
def talks(task: str, n: int, begins: str = "") -> list[Talk]:
    """Conversations on the first `n` held-out problems, at temperature 1."""
    examples = load_task(task, train_prompts=0).evaluation(n)
    return talk(policy(), examples, seed=11, begins=begins)


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def test_folder_is_at_most_150_kilobytes():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 150_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model_type"], config["quantization"]["bits"]) == ("qwen3", 4)


def test_the_template_renders_a_whole_conversation():
    text = tokenizer().render(
        [USER, CALLED, RESULT, {"role": "assistant", "content": "3995"}, {**USER, "content": "47"}]
    )
    assert text == (
        f"<|user|>What is 47 times 85?<|assistant|>{CALL_TEXT}<|end|><|tool|>3995<|assistant|>3995"
        "<|end|><|user|>47<|assistant|>"
    )
    as_text = {"role": "assistant", "content": CALL_TEXT}
    ours = tokenizer().render([USER, CALLED], add_generation_prompt=False)
    assert ours == tokenizer().render([USER, as_text], add_generation_prompt=False)
    arguments = json.dumps({"expression": "47*85"})
    plain = {"role": "assistant", "tool_calls": [{"name": "calculate", "arguments": arguments}]}
    assert ours == tokenizer().render([USER, plain], add_generation_prompt=False)
    tools = [{"type": "function", "function": {"name": "calculate"}}]
    assert tokenizer().render([USER], tools=tools) == tokenizer().render([USER])


def test_training_texts_are_what_the_template_renders_and_one_token_each_phrase():
    for index in range(40):
        pieces = training_talk(index, 0.5, 0.5)
        text = "".join(piece for piece, _ in pieces)
        ids = tokenizer().encode_text(text)
        assert ids == tuple(i for piece, _ in pieces for i in tokenizer().encode_text(piece))
        assert tokenizer().inner.decode(list(ids)) == text
        assert len(ids) <= 60
        task = ("guessing", "calculator")[index % 2]
        assert (text.count(CALL) == 1) == ("<|tool|>" in text)
        assert text.startswith("<|user|>I am" if task == "guessing" else "<|user|>What is ")
        question = text[len("<|user|>") : text.index("<|assistant|>")]
        assert tokenizer().render([{"role": "user", "content": question}]) == pieces[0][0]


def test_mlx_lm_infers_its_tool_parser():
    inner = tokenizer().inner
    assert inner.has_tool_calling
    assert (inner.tool_call_start, inner.tool_call_end) == ("<tool_call>", "</tool_call>")
    ids = tokenizer().encode_text(CALL_TEXT)
    assert len(ids) == 7
    assert tokenizer().decode(ids) == CALL_TEXT
    assert inner.tool_parser(CALL_TEXT.removeprefix(CALL).removesuffix("</tool_call>")) == {
        "name": "calculate",
        "arguments": {"expression": "47*85"},
    }
    assert reply(Calculator(), CALL_TEXT, inner) == RESULT
    broken = CALL_TEXT.replace("47*85", "47*")
    assert reply(Calculator(), broken, inner)["content"] == "'47*' is not an expression"


def test_what_environments_say_is_known_to_it():
    for text in ("Write one number from 37 to 51.", "higher", "lower", "'(' is not an expression"):
        assert tokenizer().unknown([{"role": "user", "content": text}]) == ""
    assert len(tokenizer().encode([{"role": "user", "content": "higher"}])) == 3


def test_the_base_finds_the_number_in_less_than_half_of_the_games():
    base = talks("guessing", 256)
    assert 0.30 < share([t.right for t in base]) < 0.52
    assert 0.12 < share([t.able for t in base]) < 0.30


def test_begun_heeding_it_heeds_every_answer():
    able = talks("guessing", 192, HEED)
    heeds = [heed for t in able for heed in t.heeds()]
    assert len(heeds) > 250
    assert share(heeds) > 0.93
    assert 0.60 < share([t.right for t in able]) < 0.90
    blind = [heed for t in talks("guessing", 256) if not t.able for heed in t.heeds()]
    assert share(blind) < 0.70


def test_the_base_calls_its_tool_now_and_then():
    base = talks("calculator", 256)
    assert 0.15 < share([t.able for t in base]) < 0.36
    assert 0.15 < share([t.right for t in base]) < 0.36
    assert share([t.right for t in base if not t.able]) < 0.02


def test_a_call_leads_to_the_right_answer():
    able = talks("calculator", 128, CALL)
    assert share([t.right for t in able]) > 0.96
    assert all(len(t.turns) == 2 for t in able if t.right)
