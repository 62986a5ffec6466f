"""Token ids of conversations that are already written: prompt, turns of the model, and replies.

They are built as a sampled conversation is: the prompt up to the model's turn, the turn's own
tokens with the token that ends it, then what `turns.answer_ids` puts before the next turn. What is
trained on is therefore what will be sampled and scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.errors import ConfigError, DataError
from localrl.policy.chat import Messages, settled
from localrl.policy.prompt_format import THINKS, THINKS_END, continued
from localrl.policy.tokenizer import Tokenizer
from localrl.policy.turns import ToolCall, answer_ids
from localrl.records import Example

BATCH = 256
"""Number of conversations rendered at once."""
MARKED = ("tool_calls", "reasoning_content", "thinking", "reasoning")
"""Parts of a message that only a template can write."""


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """A conversation in tokens."""

    prompt_ids: tuple[int, ...]
    token_ids: np.ndarray
    """(n,) int32, everything after the prompt; it ends with the end of the model's last turn."""
    by_model: np.ndarray
    """(n,) bool, True for the model's turns with the tokens that end them."""


@dataclass(frozen=True)
class _WrittenTurn:
    """One turn of the model: the messages before it, and the message itself."""

    before: Messages
    message: Mapping[str, Any]
    calls: Sequence[ToolCall]
    """The tool calls of the turn, also if its content shows them."""

    @property
    def whole(self) -> Messages:
        """The conversation up to and including the turn."""
        return (*self.before, self.message)


def encode_conversations(
    tokenizer: Tokenizer, examples: Sequence[Example], completions: Sequence[Messages]
) -> list[EncodedConversation | DataError]:
    """Encode each example's prompt followed by messages that begin and end with the model's.

    An error that names the row stands in the place of a conversation that cannot be encoded.

    Raises: ConfigError, see `ChatTemplate.attempt`.
    """
    found: list[EncodedConversation | DataError] = []
    for start in range(0, len(examples), BATCH):
        part = slice(start, start + BATCH)
        found += _encode_batch(tokenizer, examples[part], completions[part])
    return found


def _encode_batch(
    tokenizer: Tokenizer, examples: Sequence[Example], completions: Sequence[Messages]
) -> list[EncodedConversation | DataError]:
    turns = [_turns(tokenizer, e.messages, c) for e, c in zip(examples, completions, strict=True)]
    prompts = tokenizer.attempt_prompts(examples)
    texts = _render(tokenizer, examples, turns)
    found: list[EncodedConversation | DataError] = []
    for example, prompt, own, rendered in zip(examples, prompts, turns, texts, strict=True):
        try:
            found.append(_encode(tokenizer, example, settled(prompt), own, rendered))
        except (DataError, ConfigError) as error:
            place = example.place or example.id
            told = str(error).removeprefix(f"{place}: ")
            found.append(DataError(f"{place}: {told}"))
    return found


def _turns(tokenizer: Tokenizer, prompt: Messages, completion: Messages) -> list[_WrittenTurn]:
    shown = (*prompt, *(_once(tokenizer, message) for message in completion))
    return [
        _WrittenTurn(shown[:i], shown[i], _calls(message))
        for i, message in enumerate((*prompt, *completion))
        if i >= len(prompt) and message["role"] == "assistant"
    ]


def _once(tokenizer: Tokenizer, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message without its tool calls if its content has them too, as rollouts store it:
    a template would write them twice."""
    start = tokenizer.inner.tool_call_start if tokenizer.inner.has_tool_calling else None
    if not start or start not in (message.get("content") or ""):
        return message
    return {name: value for name, value in message.items() if name != "tool_calls"}


def _render(
    tokenizer: Tokenizer, examples: Sequence[Example], turns: Sequence[Sequence[_WrittenTurn]]
) -> list[list[tuple[str | DataError, str | DataError]]]:
    """Render every conversation up to each turn, and with it: the texts of each example's turns."""
    by_tools: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_tools.setdefault(json.dumps(example.tools), []).append(index)
    found: list[list[tuple[str | DataError, str | DataError]]] = [[] for _ in examples]
    for indices in by_tools.values():
        tools = examples[indices[0]].tools or None
        flat = [(i, turn) for i in indices for turn in turns[i]]
        before = tokenizer.attempt([turn.before for _, turn in flat], tools)
        whole = tokenizer.attempt([turn.whole for _, turn in flat], tools, False)
        for (i, _), one, other in zip(flat, before, whole, strict=True):
            found[i].append((one, other))
    return found


def _encode(
    tokenizer: Tokenizer,
    example: Example,
    prompt_ids: tuple[int, ...],
    turns: Sequence[_WrittenTurn],
    texts: Sequence[tuple[str | DataError, str | DataError]],
) -> EncodedConversation:
    ids: list[int] = []
    by_model: list[bool] = []
    for n, (turn, (before, whole)) in enumerate(zip(turns, texts, strict=True)):
        said = _turn_ids(tokenizer, settled(before), settled(whole), turn.message)
        between: tuple[int, ...] = ()
        if n + 1 < len(turns):
            replies = turns[n + 1].before[len(turn.whole) :]
            between = answer_ids(
                tokenizer,
                replies,
                ended=True,
                calls=turn.calls,
                tools=example.tools or None,
            )
        ids += [*said, *between]
        by_model += [True] * len(said) + [False] * len(between)
    return EncodedConversation(prompt_ids, np.array(ids, np.int32), np.array(by_model, bool))


def _turn_ids(
    tokenizer: Tokenizer, before: str, whole: str, message: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the tokens of a turn as the model would write it, with the one that ends it.

    before: the conversation up to the turn. whole: with the turn.

    Raises: DataError if the template does not show them, or thoughts that the prompt begins do not
    end.
    """
    text = _turn_text(tokenizer, before, whole, message)
    _check_thoughts(tokenizer, before, text)
    ids = _after(tokenizer, before, text)
    ends = [at for at, token in enumerate(ids) if token in tokenizer.end_ids]
    if not ends:
        return (*ids, _end(tokenizer))
    if tokenizer.decode(ids[ends[0] :]).strip():
        raise DataError(
            f"a turn of the assistant contains {tokenizer.pieces([ids[ends[0]]])[0]!r}, which ends "
            "turns of this model. Remove it from the text."
        )
    return ids[: ends[0] + 1]


def _turn_text(tokenizer: Tokenizer, before: str, whole: str, message: Mapping[str, Any]) -> str:
    """Return the text of a turn as the template writes it, or else the message's content."""
    content = message.get("content") or ""
    marked = any(message.get(name) for name in MARKED)
    if not tokenizer.joins:
        rest = _without(before, whole)
        if rest is not None and content.strip() in rest and (content.strip() or marked):
            ends = [tokenizer.pieces([end])[0] for end in sorted(tokenizer.end_ids)]
            if any(end in rest for end in ends):
                return rest
            return rest if marked else rest[: rest.rfind(content.strip()) + len(content.strip())]
    if marked:
        raise DataError(
            "the model's chat template does not write reasoning or tool calls of the assistant "
            "after its prompt. Write them into `content` as the model would, or use another model."
        )
    return content if tokenizer.joins else continued(before, whole, content)[len(before) :]


def _check_thoughts(tokenizer: Tokenizer, before: str, text: str) -> None:
    """Check that a turn ends the thoughts that its prompt begins, as some templates' prompts do.

    Raises: DataError.
    """
    begin, end = tokenizer.inner.think_start or THINKS, tokenizer.inner.think_end or THINKS_END
    if before.rstrip().endswith(begin) and end not in text:
        raise DataError(
            f"the prompt begins the model's thoughts with {begin}, and this turn of the assistant "
            f"does not end them. Write them into `content`, as in thoughts{end}answer; or set "
            "model.thinking=off, if the model's chat template knows that switch."
        )


def _without(before: str, whole: str) -> str | None:
    """Return what a text has after another one, of which it may lack the space at the end."""
    if whole.startswith(before):
        return whole[len(before) :]
    start = before.rstrip()
    return whole[len(start) :].lstrip() if whole.startswith(start) else None


def _after(tokenizer: Tokenizer, before: str, text: str) -> tuple[int, ...]:
    """Encode the text of a turn: in its place if the prompt's tokens stay as they are there."""
    start, ids = tokenizer.encode_text(before), tokenizer.encode_text(before + text)
    return ids[len(start) :] if ids[: len(start)] == start else tokenizer.encode_text(text)


def _end(tokenizer: Tokenizer) -> int:
    """Return the token that ends a turn where the template writes none."""
    own = (tokenizer.rendered_end, tokenizer.inner.eos_token_id)
    return next((t for t in own if t in tokenizer.end_ids), None) or min(tokenizer.end_ids)


def _calls(message: Mapping[str, Any]) -> list[ToolCall]:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        calls.append(
            ToolCall(
                str(function.get("name", "")),
                json.loads(arguments) if isinstance(arguments, str) else arguments,
            )
        )
    return calls
