"""What stands between two turns of the model, as tokens; and the calls that a turn makes.

The chat template is asked how it writes an answer behind a stand-in for the model's turn, and only
what follows that turn is taken: the tokens that the model wrote stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.policy.chat import Tools
from localrl.policy.tokenizer import Tokenizer

STAND_IN = "stand-in"
"""The model's turn in the conversation that the template is asked about."""


@dataclass(frozen=True)
class ToolCall:
    """A call that a turn makes."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why what the turn wrote is no call that can be made; None when it is one."""

    def as_message(self) -> dict[str, Any]:
        """As chat messages hold it."""
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
    """Token ids from the end of a turn up to where the model writes again.

    messages: what the turn is answered. ended: whether the model wrote its end token; else that
    comes first. calls: those that the turn made, since some templates write results by them.

    Raises: ConfigError when the template does not keep turns as they were.
    """
    turn: dict[str, Any] = {"role": "assistant", "content": STAND_IN}
    if calls:
        turn["tool_calls"] = [call.as_message() for call in calls]
    before = [{"role": "user", "content": "question"}, turn]
    try:
        whole = tokenizer.render([*before, *messages], tools=tools)
        head = tokenizer.render(before, tools=tools, add_generation_prompt=False)
    except DataError as error:
        raise ConfigError(
            f"This model cannot be given answers between its turns. {error}"
        ) from error
    ids = tokenizer.encode_text(_after_turn(tokenizer, whole, head, calls))
    return ids[1:] if ended and ids and ids[0] in tokenizer.end_ids else ids


def _after_turn(tokenizer: Tokenizer, whole: str, head: str, calls: Sequence[ToolCall]) -> str:
    """What a conversation holds from the end of the stand-in's turn on.

    Calls stand behind the stand-in. Where they end is told by `head`, which ends with the turn, or,
    as some templates write the last turn in another way than earlier ones, by its end token.
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
            "The chat template of this model does not say where a turn with calls ends, so that "
            "what was sampled could not be kept. Use another model."
        )
    return after[cut:]


def check_template(
    tokenizer: Tokenizer, role: str, calls: Sequence[ToolCall] = (), tools: Tools | None = None
) -> None:
    """See that what is answered in this role arrives at the model, before a run relies on it.

    Raises: ConfigError when the template leaves it out, or does not keep turns as they were.
    """
    answers = [{"role": role, "content": text} for text in "01"]
    if calls:
        answers = [{**answer, "name": calls[0].name} for answer in answers]
    one, other = (
        answer_ids(tokenizer, [answer], ended=True, calls=calls, tools=tools) for answer in answers
    )
    if one == other:
        raise ConfigError(
            f"The chat template of this model leaves messages of the role {role!r} out. Use a "
            "model whose template has them."
        )


def read_calls(tokenizer: Tokenizer, token_ids: Sequence[int], tools: Tools) -> list[ToolCall]:
    """The calls in a turn, in the format of the model's template; none is an empty list.

    Raises: ConfigError when the format of the model's calls is not known.
    """
    inner = tokenizer.inner
    check_tools(tokenizer)
    text = inner.decode([t for t in token_ids if t not in tokenizer.end_ids])
    pieces = text.split(inner.tool_call_start)[1:]
    found: list[ToolCall] = []
    for piece in pieces:
        inside = piece.partition(inner.tool_call_end)[0] if inner.tool_call_end else piece
        found += _parse(inner.tool_parser, inside, tools)
    return found


def check_tools(tokenizer: Tokenizer) -> None:
    """Raises: ConfigError when mlx-lm does not know how this model writes calls."""
    if not tokenizer.inner.has_tool_calling:
        raise ConfigError(
            "This model's chat template has no format of tool calls that mlx-lm knows, so it "
            "cannot use tools. Use a model made for tools, or an environment that plays in text."
        )


def _parse(parser: Any, text: str, tools: Tools) -> list[ToolCall]:
    try:
        parsed = parser(text, tools)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [ToolCall(str(call["name"]), _arguments(call.get("arguments"))) for call in calls]
    except Exception as error:  # parsers of sixteen formats raise whatever they meet
        return [ToolCall("", problem=f"not a valid tool call: {type(error).__name__}: {error}")]


def _arguments(value: Any) -> Mapping[str, Any]:
    """Keyword arguments; some formats hold them as JSON text."""
    value = json.loads(value) if isinstance(value, str) else value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"arguments are {value!r:.60}, not an object")
    return value
