"""Which earlier call a call continues, and with which tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from localrl.agents.chat import Written, for_template, key_of, read_turn
from localrl.agents.conversations import AgentLimits, Asked, Conversation, TooMuch
from localrl.embedded import embedded_model_path
from localrl.errors import DataError
from localrl.policy.tokenizer import load_tokenizer
from localrl.policy.turns import read_calls
from localrl.records import Example, ModelTurn

LIMITS = AgentLimits(calls=3, prompt_tokens=60, seconds=1.0)
FIRST = {"role": "user", "content": "What is 12 times 34?"}
LOWER = {"role": "user", "content": "lower"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_model_path("turns-0.1m"))


class Talk:
    """A conversation whose model writes given tokens."""

    def __init__(self, tokenizer, most=100):
        self.tokenizer, self.conversation = tokenizer, Conversation(0, most)

    def ask(self, messages, most=None):
        plain = tuple(for_template(messages))
        rendered = self.tokenizer.encode(plain)
        asked = Asked(plain, (), rendered, most)
        return self.conversation.call(asked, self.tokenizer, LIMITS), rendered

    def write(self, ids, content):
        turn = ModelTurn(Example("x", (FIRST,)), 0, tuple(ids), content, "stop")
        written = Written(content, "", (), "stop")
        self.conversation.write(turn, written, written.message("x"))


def said(content):
    return {"role": "assistant", "content": content}


def end(tokenizer):
    [token] = tokenizer.end_ids
    return token


def test_a_rendered_prompt_that_begins_with_all_tokens_continues_them(tokenizer):
    talk = Talk(tokenizer)
    call, rendered = talk.ask([FIRST])
    assert (call.prompt, call.continues, call.max_tokens) == (rendered, None, 100)
    ids = (*tokenizer.encode_text("408"), end(tokenizer))
    talk.write(ids, "408")
    call, rendered = talk.ask([FIRST, said("408"), LOWER], most=7)
    assert (call.prompt, call.continues, call.max_tokens) == (rendered, 0, 7)
    assert call.prompt[: len(talk.conversation._ends[0])] == talk.conversation._ends[0]


def test_tokens_that_encoding_would_not_give_back_are_kept(tokenizer):
    talk = Talk(tokenizer)
    call, _ = talk.ask([FIRST])
    odd = [i for digit in "408" for i in tokenizer.encode_text(digit)]
    assert tuple(odd) != tokenizer.encode_text("408")
    talk.write((*odd, end(tokenizer)), "408")
    longer = [FIRST, said(" 408\n"), LOWER]  # agents strip, or do not
    after, rendered = talk.ask(longer)
    assert after.continues == 0
    assert after.prompt != rendered
    assert after.prompt[: len(call.prompt) + len(odd) + 1] == (*call.prompt, *odd, end(tokenizer))
    tail = after.prompt[len(call.prompt) + len(odd) + 1 :]
    assert tail == rendered[-len(tail) :]
    assert talk.conversation.used == len(odd) + 1 + len(tail)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What is 12 times 35?"}],
        [FIRST],
        [FIRST, said("409"), LOWER],
        [{**FIRST, "content": f"{FIRST['content']} "}, said("408"), LOWER],
    ],
)
def test_other_messages_begin_a_new_sequence(tokenizer, messages):
    talk = Talk(tokenizer)
    talk.ask([FIRST])
    talk.write((*tokenizer.encode_text("408"), end(tokenizer)), "408")
    call, rendered = talk.ask(messages)
    assert (call.continues, call.prompt) == (None, rendered)


def test_an_earlier_point_begins_a_new_sequence_with_its_tokens(tokenizer):
    talk = Talk(tokenizer)
    call, _ = talk.ask([FIRST])
    odd = (*(i for digit in "408" for i in tokenizer.encode_text(digit)), end(tokenizer))
    talk.write(odd, "408")
    second, _ = talk.ask([FIRST, said("408"), LOWER])
    talk.write((*tokenizer.encode_text("407"), end(tokenizer)), "407")
    third, _ = talk.ask([FIRST, said("408"), {"role": "user", "content": "higher"}])
    assert third.continues is None
    assert third.prompt[: len(call.prompt) + len(odd)] == (*call.prompt, *odd)
    assert third.prompt != second.prompt


def test_limits(tokenizer):
    talk = Talk(tokenizer, most=12)
    talk.ask([FIRST])
    ids = (*tokenizer.encode_text("408"), end(tokenizer))
    talk.write(ids, "408")
    call, _ = talk.ask([FIRST, said("408"), LOWER])
    assert call.max_tokens == 12 - talk.conversation.used
    talk.write(ids, "408")
    long = [FIRST, said("408"), LOWER, said("408"), {"role": "user", "content": "lower " * 9}]
    with pytest.raises(TooMuch, match="max_completion_tokens") as caught:
        talk.ask(long)
    assert caught.value.reason == "length"
    with pytest.raises(DataError, match=r"rollout\.max_prompt_tokens"):
        talk.ask([{"role": "user", "content": "lower " * 60}])
    other, _ = talk.ask([{"role": "user", "content": "What is 12 times 35?"}])
    assert other.continues is None
    talk.write(ids, "408")
    with pytest.raises(TooMuch, match=r"allows 3 calls \(rollout\.max_turns\)") as caught:
        talk.ask([FIRST])
    assert caught.value.reason == "turns"


def test_messages_as_clients_write_them():
    """The openai package's own objects, dumped, have fields of None and calls with their ids."""
    call = {"name": "calculate", "arguments": '{"expression": "1+2"}'}
    dumped = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": None,
        "tool_calls": [{"id": "7", "type": "function", "function": call}],
    }
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    result = {"role": "tool", "tool_call_id": "7", "content": "3"}
    assert for_template([parts, dumped, result]) == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "calculate", "arguments": {"expression": "1+2"}},
                }
            ],
        },
        {"role": "tool", "content": "3", "name": "calculate"},
    ]
    keys = [key_of(message) for message in for_template([dumped, {**dumped, "reasoning": "so"}])]
    assert keys[0] == keys[1]


def test_arguments_that_are_nested_too_deeply_stay_text():
    deep = {"name": "calculate", "arguments": "[" * 200_000}
    [message] = for_template([{**said(None), "tool_calls": [{"function": deep}]}])
    assert message["tool_calls"][0]["function"] == deep


@pytest.mark.parametrize(
    "arguments", [{"expression": {1, 2}}, {"expression": b"1"}, {"expression": "\ud83d"}]
)
def test_calls_that_are_not_json_stay_text(tokenizer, arguments, monkeypatch):
    """Parsers of some formats read Python literals."""
    call = {"name": "calculate", "arguments": arguments}
    monkeypatch.setattr(tokenizer.inner, "_tool_parser", lambda text, tools: call)
    ids = tokenizer.encode_text('<tool_call>{"name": "calculate"}</tool_call>')
    [read] = read_calls(tokenizer, ids, [{}])
    assert "not a valid tool call" in (read.problem or "")
    turn = ModelTurn(Example("x", (FIRST,)), 0, ids, "a call", "stop")
    assert read_turn(tokenizer, turn, [{}], ()) == Written("a call", "", (), "stop")


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>so</think>\n\nyes", "so", "yes"),
        ("so</think>yes", "so", "yes"),
        ("<think>so", "so", ""),
        ("yes", "", "yes"),
    ],
)
def test_thoughts_are_apart_from_what_is_said(text, reasoning, content):
    thinks = {"has_thinking": True, "think_start": "<think>", "think_end": "</think>"}
    tokenizer: Any = SimpleNamespace(inner=SimpleNamespace(**thinks))
    turn = ModelTurn(Example("x", (FIRST,)), 0, (1, 2), text, "stop")
    written = read_turn(tokenizer, turn, (), ())
    assert (written.reasoning, written.content) == (reasoning, content)
    assert ("reasoning" in written.message("x")) == bool(reasoning)
