"""The conversations of one completion's agent: which earlier call a new one continues.

A call continues a sequence of tokens if its prompt, as rendered, begins with all of them. Texts do
not always encode to the tokens that they came from, and templates may drop thoughts of earlier
turns; so a call whose messages repeat those of an earlier call and the turn that it was given also
continues it: with the tokens as they were written, and only what follows is rendered and encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.agents.chat import Written, for_template, key_of
from localrl.errors import DataError
from localrl.policy.tokenizer import Tokenizer
from localrl.policy.turns import ToolCall, answer_ids
from localrl.records import AgentCall, FinishReason, ModelTurn


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    messages: tuple[Mapping[str, Any], ...]
    """Its conversation, in the form that templates take."""
    tools: tuple[Mapping[str, Any], ...]
    rendered: tuple[int, ...]
    """Its prompt, as the template renders it."""
    most: int | None = None
    """Its own limit of tokens."""
    stop: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The tools, and what each message says, as texts to compare."""
        return (json.dumps(self.tools, default=repr), *map(key_of, self.messages))


@dataclass(frozen=True)
class AgentLimits:
    """Limits on an agent."""

    calls: int
    """`rollout.max_turns`."""
    prompt_tokens: int
    """Longest prompt of a sequence's first call."""
    seconds: float
    """Time between two calls."""


class TooMuch(Exception):
    """A call beyond a limit. reason: how its completion ends."""

    def __init__(self, message: str, reason: FinishReason) -> None:
        super().__init__(message)
        self.reason: FinishReason = reason


@dataclass(frozen=True)
class _Turn:
    """A call that was answered."""

    keys: tuple[str, ...]
    """Keys of the request and of the turn."""
    ids: tuple[int, ...]
    """Everything from the sequence's beginning to the end of the turn."""
    sequence: int
    calls: tuple[ToolCall, ...]
    messages: tuple[Mapping[str, Any], ...]
    """Messages of the request, and the turn."""


@dataclass(eq=False)
class Conversation:
    """The calls of an agent, and the turns that it got, in one completion."""

    number: int
    max_tokens: int
    """Most tokens of the completion: those that the model writes and reads in all its sequences,
    without their prompts."""
    turns: list[_Turn] = field(default_factory=list)
    used: int = 0
    """Number of these tokens so far."""
    cut: FinishReason | None = None
    """The limit that the latest call was refused for, if it was."""
    last: FinishReason = "stop"
    """The reason why the latest turn ended; "stop" for a limit of the agent's own."""
    _ends: list[tuple[int, ...]] = field(default_factory=list)
    """All tokens of each sequence."""
    _first: list[int] = field(default_factory=list)
    """Number of messages in each sequence's first request."""
    _asked: tuple[Asked, AgentCall] | None = None

    def call(self, asked: Asked, tokenizer: Tokenizer, limits: AgentLimits) -> AgentCall:
        """Return the call for a turn.

        Raises: TooMuch if the completion has no call or token left; DataError if the prompt of a
        new sequence is too long; ConfigError as `answer_ids` does.
        """
        if len(self.turns) >= limits.calls:
            raise TooMuch(f"the run allows {limits.calls} calls (rollout.max_turns)", "turns")
        sequence, prompt = self._link(asked, tokenizer)
        if sequence is None and len(prompt) > limits.prompt_tokens:
            raise DataError(
                f"the prompt has {len(prompt)} tokens; the run allows {limits.prompt_tokens} "
                "(rollout.max_prompt_tokens)"
            )
        read = 0 if sequence is None else len(prompt) - len(self._ends[sequence])
        room = self.max_tokens - self.used - read
        if room < 1:
            raise TooMuch(
                f"no token is left of the completion's {self.max_tokens} "
                "(rollout.max_completion_tokens)",
                "length",
            )
        self.used += read
        self.cut = None
        call = AgentCall(self.number, prompt, sequence, min(room, asked.most or room), asked.stop)
        self._asked = asked, call
        return call

    def write(self, turn: ModelTurn, written: Written, message: Mapping[str, Any]) -> None:
        """Record the turn that the latest call got. message: as its agent gets it."""
        assert self._asked is not None
        (asked, call), self._asked = self._asked, None
        ids = (*call.prompt, *turn.token_ids)
        if call.continues is None:
            self._ends.append(ids)
            self._first.append(len(asked.messages))
        sequence = len(self._ends) - 1 if call.continues is None else call.continues
        self._ends[sequence] = ids
        own = turn.finish_reason == "length" and call.max_tokens < self.max_tokens - self.used
        self.used += len(turn.token_ids)
        self.last = "stop" if own else turn.finish_reason
        [plain] = for_template([message])
        messages = (*asked.messages, plain)
        keys = (*asked.keys, key_of(plain))
        self.turns.append(_Turn(keys, ids, sequence, written.calls, messages))

    @property
    def transcript(self) -> tuple[Mapping[str, Any], ...]:
        """The latest sequence as messages, from the model's first turn on."""
        if not self.turns:
            return ()
        turn = self.turns[-1]
        return turn.messages[self._first[turn.sequence] :]

    def _link(self, asked: Asked, tokenizer: Tokenizer) -> tuple[int | None, tuple[int, ...]]:
        """Return the sequence that a request continues, if one, and its prompt's tokens."""
        rendered = asked.rendered
        whole = [s for s, ids in enumerate(self._ends) if rendered[: len(ids)] == ids]
        if whole:
            return max(whole, key=lambda s: len(self._ends[s])), rendered
        keys = asked.keys
        said = [turn for turn in self.turns[::-1] if keys[: len(turn.keys)] == turn.keys]
        if not said:
            return None, rendered
        turn = max(said, key=lambda turn: len(turn.keys))
        more = answer_ids(
            tokenizer,
            asked.messages[len(turn.messages) :],
            ended=turn.ids[-1] in tokenizer.end_ids,
            calls=turn.calls,
            tools=asked.tools or None,
        )
        ends = self._ends[turn.sequence] == turn.ids
        return turn.sequence if ends else None, (*turn.ids, *more)


def messages_of(value: Any) -> Sequence[Mapping[str, Any]] | None:
    """Return the messages that an agent returned; None if they are none."""
    if not isinstance(value, list) or not value:
        return None
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        if not isinstance(message.get("content"), str | None):
            return None
    return value
