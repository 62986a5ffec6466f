"""Chat messages of OpenAI's API: as templates take them, as keys to compare, and as answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from localrl.policy.tokenizer import Tokenizer
from localrl.policy.turns import ToolCall, read_calls
from localrl.records import ModelTurn

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """A turn of the model as its agent sees it."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    """"stop", "length" or "tool_calls"."""

    def message(self, name: str) -> dict[str, Any]:
        """Format it as a message. name: what the ids of its tool calls begin with."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.calls:
            message["content"] = self.content or None
            message["tool_calls"] = [
                {
                    "id": f"{name}-{n}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
                }
                for n, call in enumerate(self.calls)
            ]
        return message


def read_turn(
    tokenizer: Tokenizer, turn: ModelTurn, tools: Sequence[Any], stop: Sequence[str]
) -> Written:
    """Return a turn as its agent sees it: thoughts and tool calls apart, and no stop text.

    A call that cannot be parsed stays text: what to do then is the agent's.
    """
    text, calls = turn.text, []
    if turn.finish_reason == "closed":
        text = min((text.partition(end)[0] for end in stop if end in text), key=len, default=text)
    if tools and turn.finish_reason in ("stop", "closed") and tokenizer.inner.has_tool_calling:
        calls = read_calls(tokenizer, turn.token_ids, tools)
    if any(call.problem for call in calls):
        calls = []
    reasoning, content = _thoughts(tokenizer, text)
    if calls:
        content = content.partition(tokenizer.inner.tool_call_start)[0].strip()
    reason = "length" if turn.finish_reason in ("length", "loop") else "stop"
    return Written(content, reasoning, tuple(calls), "tool_calls" if calls else reason)


def _thoughts(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """Split a turn into thoughts and the rest, as mlx-lm's server does for models that think."""
    inner = tokenizer.inner
    if not inner.has_thinking:
        return "", text
    before, ended, after = text.partition(inner.think_end)
    thoughts = before.partition(inner.think_start)[2]
    if not ended:
        return (thoughts, "") if inner.think_start in text else ("", text)
    return thoughts or before, after.lstrip("\n")


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them: contents as text, arguments of calls as objects,
    results of tools with the names of the functions."""
    found, names = [], {}
    for message in messages:
        plain = {key: value for key, value in message.items() if value is not None}
        plain["content"] = _text(message.get("content"))
        if calls := plain.get("tool_calls"):
            names |= {call.get("id"): call["function"].get("name") for call in calls}
            plain["tool_calls"] = [
                {"type": "function", "function": _function(call["function"])} for call in calls
            ]
        identity = plain.pop("tool_call_id", None)
        if message["role"] == "tool" and names.get(identity):
            plain.setdefault("name", names[identity])
        found.append(plain)
    return found


def key_of(message: Mapping[str, Any]) -> str:
    """Return a text that is the same for messages which say the same. message: for a template.

    Agents often strip what the model wrote, and need not repeat its thoughts.
    """
    calls = [call["function"] for call in message.get("tool_calls", ())]
    role, content = message["role"], message["content"]
    said = [role, content.strip() if role == "assistant" else content, message.get("name"), calls]
    return json.dumps(said, sort_keys=True, default=repr)


def completion(
    number: str, model: str, written: Written, turn: ModelTurn, read: int, logprobs: Any
) -> dict[str, Any]:
    """Return the answer to a request. number: its id; read: the number of tokens of its prompt."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": written.message(number),
        "finish_reason": written.finish_reason,
        "logprobs": logprobs,
    }
    wrote = len(turn.token_ids)
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": wrote,
            "total_tokens": read + wrote,
        },
    }


def logprobs_of(tokenizer: Tokenizer, turn: ModelTurn) -> dict[str, Any]:
    """Return the log-probabilities of a turn's tokens in the API's form, as they were sampled."""
    pieces = tokenizer.pieces(turn.token_ids)
    entries = [
        {"token": text, "bytes": list(text.encode()), "logprob": logprob, "top_logprobs": []}
        for text, logprob in zip(pieces, turn.logprobs, strict=True)
    ]
    ended = bool(entries) and turn.token_ids[-1] in tokenizer.end_ids
    return {"content": entries[:-1] if ended else entries}


def streamed(answer: Mapping[str, Any], *, usage: bool) -> Iterator[str]:
    """Yield an answer as the events of a stream: the turn whole, its end, and the usage if asked
    for."""
    [choice] = answer["choices"]
    head = {
        **{name: answer[name] for name in ("id", "created", "model")},
        "object": "chat.completion.chunk",
    }
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(delta["tool_calls"])]
    for part, reason, logprobs in (
        (delta, None, choice["logprobs"]),
        ({}, choice["finish_reason"], None),
    ):
        one = {"index": 0, "delta": part, "finish_reason": reason, "logprobs": logprobs}
        yield _event({**head, "choices": [one]})
    if usage:
        yield _event({**head, "choices": [], "usage": answer["usage"]})
    yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or ())


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's function with its arguments as an object, if its text is one."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    return {"name": function.get("name"), "arguments": arguments}
