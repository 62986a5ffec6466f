"""Tokens between two turns of the model, and the tool calls in a turn.

The chat template renders a reply after a stand-in for the model's turn, and only the text after
that turn is used: the tokens that the model wrote stay unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.policy.chat import Tools
from localrl.policy.prompt_format import ASKED, EXCHANGE, STAND_IN, THINKS, THINKS_END
from localrl.policy.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolCall:
    """A tool call made in a turn."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Reason the call in the turn is invalid; None if it is valid."""

    def as_message(self) -> dict[str, Any]:
        """Format the call as in chat messages."""
        function = {"name": self.name, "arguments": dict(self.arguments)}
        return {"type": "function", "function": function}


def answer_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    ended: bool,
    calls: Sequence[ToolCall] = (),
    tools: Tools | None = None,
) -> tuple[int, ...]:
    """Return the token ids from the end of a turn up to where the model writes again.

    messages: the reply to the turn. ended: True if the model wrote its end token; otherwise the
    result begins with it. calls: the turn's calls, because some templates render results by them.

    Raises: ConfigError if the template does not keep turns unchanged.
    """
    turn: dict[str, Any] = {"role": "assistant", "content": STAND_IN}
    if calls:
        turn["tool_calls"] = [call.as_message() for call in calls]
    before = [{"role": "user", "content": ASKED}, turn]
    try:
        whole = tokenizer.render([*before, *messages], tools=tools)
        head = tokenizer.render(before, tools=tools, add_generation_prompt=False)
    except DataError as error:
        raise ConfigError(
            f"This model's template cannot render replies between its turns. {error}"
        ) from error
    ids = tokenizer.encode_text(_after_turn(tokenizer, whole, head, calls))
    return ids[1:] if ended and ids and ids[0] in tokenizer.end_ids else ids


def _after_turn(tokenizer: Tokenizer, whole: str, head: str, calls: Sequence[ToolCall]) -> str:
    """Return the text of a conversation after the stand-in's turn.

    Calls follow the stand-in. Their end is found from `head`, which ends with the turn, or by the
    end token, because some templates render the last turn differently from earlier ones.
    """
    after = whole.rpartition(STAND_IN)[2]
    if not calls:
        return after
    ends = [tokenizer.inner.decode([token]) for token in tokenizer.end_ids]
    cut = max(head.rfind(end) for end in ends)
    kept = head if cut < head.rfind(STAND_IN) else head[:cut]
    if whole.startswith(kept):
        return whole[len(kept) :]
    cut = min((place for end in ends if (place := after.find(end)) >= 0), default=0)
    if calls[0].name not in after[:cut]:
        raise ConfigError(
            "This model's chat template does not show where a turn with tool calls ends, so the "
            "sampled tokens could not be kept. Use another model."
        )
    return after[cut:]


def check_template(
    tokenizer: Tokenizer, role: str, calls: Sequence[ToolCall] = (), tools: Tools | None = None
) -> None:
    """Check that replies in this role reach the model, before a run relies on it.

    Raises: ConfigError if the template omits them, or does not keep turns unchanged.
    """
    answers = [{"role": role, "content": text} for text in "01"]
    if calls:
        answers = [{**answer, "name": calls[0].name} for answer in answers]
    one, other = (
        answer_ids(tokenizer, [answer], ended=True, calls=calls, tools=tools) for answer in answers
    )
    if one == other:
        raise ConfigError(
            f"This model's chat template omits messages with the role {role!r}. Use a model whose "
            "template renders them."
        )


def read_calls(
    tokenizer: Tokenizer, token_ids: Sequence[int], tools: Tools, *, begun: str = ""
) -> list[ToolCall]:
    """Parse the calls in a turn, in the format of the model's template; empty if there are none.

    Calls that the model only thinks about are none: those before the end of its thoughts.
    begun: the beginning of the turn, if the prompt gave one.

    Raises: ConfigError if the format of the model's calls is unknown.
    """
    inner = tokenizer.inner
    check_tools(tokenizer)
    text = _after_thoughts(tokenizer, begun + tokenizer.decode(token_ids))
    pieces = text.split(inner.tool_call_start)[1:]
    found: list[ToolCall] = []
    for piece in pieces:
        inside = piece.partition(inner.tool_call_end)[0] if inner.tool_call_end else piece
        found += _parse(inner.tool_parser, inside, tools)
    return found


def _after_thoughts(tokenizer: Tokenizer, text: str) -> str:
    """Return what follows the last end of thoughts, up to where they begin again.

    Some templates begin the thoughts themselves, at the end of the prompt: nothing follows then,
    if they do not end.
    """
    begin, end = tokenizer.inner.think_start or THINKS, tokenizer.inner.think_end or THINKS_END
    _, ended, after = text.rpartition(end)
    if not ended and tokenizer.render(EXCHANGE[:1]).rstrip().endswith(begin):
        return ""
    return after.partition(begin)[0]


def check_tools(tokenizer: Tokenizer) -> None:
    """Check that the format of this model's tool calls is known.

    Raises: ConfigError if mlx-lm does not know it.
    """
    if not tokenizer.inner.has_tool_calling:
        raise ConfigError(
            "This model's chat template has no tool call format that mlx-lm knows, so it cannot "
            "use tools. Use a model made for tools, or an environment with text-only turns."
        )


def _parse(parser: Any, text: str, tools: Tools) -> list[ToolCall]:
    try:
        parsed = parser(text, tools)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [_checked(call) for call in calls]
    except Exception as error:  # parsers of sixteen formats may raise anything
        return [ToolCall("", problem=f"not a valid tool call: {type(error).__name__}: {error}")]


def _checked(call: Mapping[str, Any]) -> ToolCall:
    """Read a call, which must be JSON: some formats are Python literals, and may hold sets."""
    read = ToolCall(str(call["name"]), _arguments(call.get("arguments")))
    json.dumps(read.as_message(), ensure_ascii=False).encode()  # fails for half a character too
    return read


def _arguments(value: Any) -> Mapping[str, Any]:
    """Parse keyword arguments; some formats store them as JSON text."""
    value = json.loads(value) if isinstance(value, str) else value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"arguments are {value!r:.60}, not an object")
    return value
