"""Checks of chat requests: only what the server does is accepted, and nothing is loaded for one.

mlx-lm's server loads models, adapters and images that a request names, ignores fields that it does
not know, and does not survive some values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from io import BufferedIOBase
from typing import Any

LOADED = ("adapters", "draft_model", "num_draft_tokens", "role_mapping")
"""Fields by which a request to mlx-lm's server has it load something, or change the prompt."""
MOST_BYTES = 16 << 20
"""Longest body of a request."""
LARGEST = 2**31 - 1
"""Largest whole number in a request."""
Body = dict[str, Any]


class Refused(Exception):
    """A request that is not answered. status: its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ServedFacts:
    """Facts on the model that limit requests."""

    names: tuple[str, ...]
    """Names of the models; the first one is asked if a request names none. Empty if there is one
    model, under any name."""
    vocabulary: int
    """Number of tokens that the model knows."""
    context: int | None
    """Longest conversation that the model was made for, in tokens; None if it does not say."""


def read_body(headers: Message, file: BufferedIOBase) -> bytes:
    """Read the body of a request, as long as its headers say.

    Raises: Refused for one of unknown length, or above `MOST_BYTES`.
    """
    length = headers.get("Content-Length", "")
    if not (length.isascii() and length.isdecimal()):
        raise Refused("there is no Content-Length", 411)
    if int(length) > MOST_BYTES:
        raise Refused(f"the request has more than {MOST_BYTES} bytes", 413)
    return file.read(int(length))


def error_body(message: str) -> dict[str, Any]:
    """Return an error as OpenAI's API has it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {"error": error}


def read_request(data: bytes, facts: ServedFacts) -> Body:
    """Return the body of a chat request in the form that mlx-lm's handler takes.

    Raises: Refused.
    """
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    model = body.setdefault("model", facts.names[0] if facts.names else "")
    if not isinstance(model, str) or (facts.names and model not in facts.names):
        raise Refused(f"there is no model {model!r:.80} here; ask {' or '.join(facts.names)}", 404)
    _check_fields(body)
    _check_tokens(body, facts)
    _check_messages(body.get("messages"))
    if body.pop("tool_choice", "auto") == "none":
        body.pop("tools", None)
    if "stream_options" in body:
        usage = bool(body["stream_options"].get("include_usage"))
        body["stream_options"] = {"include_usage": usage}
    return body


def _check_fields(body: Body) -> None:
    for name in LOADED:
        if name in body:
            raise Refused(f"{name} is not supported: nothing is loaded for a request")
    for name, (accepts, why) in ACCEPTED.items():
        if name in body and not accepts(body[name]):
            raise Refused(f"{name} is {body[name]!r:.80}; {why}")
    for name, value in body.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise Refused(f"{name} is {value!r:.80}, which is too large")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)


def _are_tools(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in value
    )


ACCEPTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda value: value == 1, "one answer is given for each request"),
    "response_format": (lambda value: value == {"type": "text"}, "only text is written"),
    "tool_choice": (lambda value: value in ("auto", "none"), "the model decides (auto), or none"),
    "functions": (lambda value: False, "name them in tools"),
    "function_call": (lambda value: False, "name them in tools"),
    "stop": (_is_stop, "give texts that are not empty"),
    "tools": (_are_tools, "give a list of functions"),
    "stream_options": (lambda value: isinstance(value, dict), "give an object"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "give an object"),
}
"""Values of some fields that are accepted, and what a refusal says; mlx-lm checks the numbers."""


def _check_tokens(body: Body, facts: ServedFacts) -> None:
    """Check numbers that must be tokens of the model, or numbers of them that it can handle."""
    vocabulary, context = facts.vocabulary, facts.context
    for name in ("max_tokens", "max_completion_tokens"):
        if context is not None and isinstance(body.get(name), int) and body[name] > context:
            raise Refused(f"{name} is {body[name]!r:.80}; the model's context is {context} tokens")
    top_k = body.get("top_k", 0)
    if not isinstance(top_k, int) or not 0 <= top_k < vocabulary:
        raise Refused(f"top_k is {top_k!r:.80}; the model has {vocabulary} tokens")
    bias = body.get("logit_bias", {})
    if not isinstance(bias, dict) or not all(
        name.isdecimal() and name.isascii() and int(name) < vocabulary for name in bias
    ):
        raise Refused(f"logit_bias has to name tokens below {vocabulary}")


def _check_messages(messages: Any) -> None:
    """Check that messages are text: mlx-lm's server would fetch images by their address."""
    if not isinstance(messages, list) or not messages:
        raise Refused("messages has to be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f"the message {message!r:.80} has no role")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(map(_is_text, parts)):
            raise Refused(f"a message's content is {content!r:.80}; only text is read")


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        and part.keys() <= {"type", "text"}
    )
