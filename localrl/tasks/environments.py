"""Environments that a task's completions interact with, turn by turn.

An environment is a user-defined object, one per completion, in the child process that rewards run
in. It plays in text (`step(text)`), or it offers tools in TRL's forms: `tools`, which are plain
functions, and `environment_factory`, which makes objects whose public methods are tools. Both are
described in docs/environments.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.policy.tokenizer import Tokenizer
from localrl.policy.turns import ToolCall, answer_ids, check_template, check_tools, read_calls
from localrl.processes.worker import Reply, Worker
from localrl.records import EnvironmentReply, Example, ModelTurn, RewardSpec
from localrl.tasks.breakage import Breakage
from localrl.utils.text import readable

CHILD = "localrl.tasks.environment_child"
SAID = ("stop", "closed")
"""Finish reasons of turns that can be answered; a turn that was cut off cannot."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """Description of one kind of environment."""

    name: str
    """Name of its class."""
    plays_in_text: bool
    owns_reward: bool
    """True if it has `get_reward`."""
    schemas: tuple[Row, ...]
    """JSON schemas of the functions that the model may call."""


@dataclass(eq=False)
class Environments:
    """The environments of one task. Create them with `open_environments`."""

    factory: str | None
    tools: tuple[str, ...]
    kinds: Mapping[str, Kind]
    """Kinds by the value of an example's `environment` column; `""` if there is only one."""
    worker: Worker
    limit_s: float
    """Time limit in seconds for one answer of an environment or one tool call."""
    warn: Callable[[str], None]
    tokenizer: Tokenizer | None = None
    """Tokenizer of the model, once it is loaded; see `connect`."""
    _numbers: Iterator[int] = field(default_factory=count)
    _calls_made: int = 0
    _calls_failed: int = 0

    def __post_init__(self) -> None:
        self._breakage = Breakage("environment", "turns", self.warn)

    @property
    def has_tools(self) -> bool:
        """True if the model may call functions."""
        return any(kind.schemas for kind in self.kinds.values())

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The environments' own rewards, named after their classes, as in TRL."""
        names = dict.fromkeys(kind.name for kind in self.kinds.values() if kind.owns_reward)
        return tuple(RewardSpec(n, f"{CHILD}:reward_of(name={n!r})") for n in names)

    def connect(self, tokenizer: Tokenizer) -> None:
        """Connect the environments to a model.

        Raises: ConfigError if its template cannot express such a conversation.
        """
        self.tokenizer = tokenizer
        for kind in self.kinds.values():
            if kind.plays_in_text:
                check_template(tokenizer, "user")
            else:
                check_tools(tokenizer)
                call = ToolCall(kind.schemas[0]["function"]["name"])
                check_template(tokenizer, "tool", [call], kind.schemas)

    def prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Prompt ids: the messages, the text that `reset` adds to the last one, and the tools.

        Earlier conversations are dropped: their completions have been scored by now.

        Raises: DataError if an environment cannot be reset.
        """
        shown = [self.with_tools(example) for example in examples]
        rows = {example.id: row_of(example) for example in examples}
        reply = self._call("observe", rows=rows)
        if not reply.ok:
            raise DataError(
                f"The environment {self.factory} cannot be reset: {reply.message}. Fix it, then "
                f"start again.\n{reply.traceback or ''}".strip()
            )
        texts = dict(zip(rows, reply.value, strict=True))
        return self._tokenizer.encode_prompts(
            [_observed(example, texts[example.id]) for example in shown]
        )

    def with_tools(self, example: Example) -> Example:
        """Return the example with the functions that the model may call in its environment.

        Raises: DataError if its row has `tools` as well.
        """
        schemas = self._kind(example).schemas
        if schemas and example.tools:
            raise DataError(
                f"{example.place or example.id} has `tools` of its own, but those of the "
                "environment are the ones that can be called. Leave the column out with --columns "
                "tools="
            )
        return replace(example, tools=schemas or example.tools)

    def answer(self, spoken: Sequence[ModelTurn]) -> list[EnvironmentReply]:
        """Pass turns to their environments; those whose environment broke are marked as failed.

        Raises: RewardError if environments break too often.
        """
        taken: set[int] = set()
        calls = [self._calls(said) for said in spoken]
        turns = [self._turn(*each, taken) for each in zip(spoken, calls, strict=True)]
        reply = self._call("play", tools=self.tools, turns=turns)
        outcomes = reply.value if reply.ok else [{"error": reply.message}] * len(turns)
        self._judge(outcomes)
        return [
            self._heard(said, turn["conversation"], made, outcome)
            for said, turn, made, outcome in zip(spoken, turns, calls, outcomes, strict=True)
        ]

    def take_counts(self) -> tuple[int, int]:
        """Number of tool calls since the last time, and of those that failed."""
        counts = self._calls_made, self._calls_failed
        self._calls_made = self._calls_failed = 0
        return counts

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None, "connect() comes first"
        return self.tokenizer

    def _kind(self, example: Example) -> Kind:
        name = "" if "" in self.kinds else str(example.columns.get("environment"))
        if name not in self.kinds:
            raise DataError(
                f"The environment of {example.id} is {name!r}; {self.factory} has "
                f"{', '.join(map(repr, self.kinds))}. Name one of them in its `environment` column."
            )
        return self.kinds[name]

    def _call(self, function: str, **arguments: Any) -> Reply:
        # Each part has its own limit in the child; this one is for code that ignores it.
        parts = max((len(part) for part in arguments.values()), default=0)
        return self.worker.call(
            f"{CHILD}:{function}",
            {"factory": self.factory, "limit_s": self.limit_s, **arguments},
            limit_s=self.worker.time_limit_s + self.limit_s * (1 + parts),
        )

    def _calls(self, said: ModelTurn) -> list[ToolCall]:
        kind = self._kind(said.example)
        if kind.plays_in_text or said.finish_reason not in SAID:
            return []
        return read_calls(self._tokenizer, said.token_ids, kind.schemas, begun=_begun(said))

    def _turn(self, said: ModelTurn, calls: Sequence[ToolCall], taken: set[int]) -> dict[str, Any]:
        """The request to the child; if several continue one conversation, all but one copy it."""
        number = said.conversation
        turn: dict[str, Any] = {"example": said.example.id, "first": number is None}
        if number is None:
            number = next(self._numbers)
        elif number in taken:
            turn["copy_of"], number = number, next(self._numbers)
        taken.add(number)
        turn["conversation"] = number
        if said.finish_reason not in SAID:
            return turn
        if self._kind(said.example).plays_in_text:
            return {**turn, "text": _begun(said) + said.text}
        return {**turn, "calls": [asdict(call) for call in calls]} if calls else turn

    def _heard(
        self, said: ModelTurn, number: int, calls: Sequence[ToolCall], outcome: Mapping[str, Any]
    ) -> EnvironmentReply:
        turn: dict[str, Any] = {"role": "assistant", "content": _begun(said) + said.text}
        if calls:
            turn["tool_calls"] = [call.as_message() for call in calls]
        if "error" in outcome:
            return EnvironmentReply(number, (turn,), failed=True)
        answers = _answers(calls, outcome)
        if not answers:
            return EnvironmentReply(number, (turn,))
        ids = answer_ids(
            self._tokenizer,
            answers,
            ended=said.token_ids[-1] in self._tokenizer.end_ids,
            calls=calls,
            tools=self.with_tools(said.example).tools or None,
        )
        return EnvironmentReply(number, (turn, *answers), ids)

    def _judge(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Count failures of tools and environments; see `Breakage.add`."""
        results = [result for outcome in outcomes for result in outcome.get("results", ())]
        self._calls_made += len(results)
        self._calls_failed += sum(result["failed"] for result in results)
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        self._breakage.add(errors, len(outcomes))


def open_environments(
    factory: str | None,
    tools: Sequence[str],
    worker: Worker,
    *,
    limit_s: float,
    warn: Callable[[str], None],
) -> Environments | None:
    """Open a task's environments; None if it has neither environment nor tools.

    factory: `file.py:Name` or `module:Name`: a class, a function that makes objects, or a
        dictionary of these; tools: functions, named in the same way.

    Raises: ConfigError if there is no such name; DataError if the object cannot be used.
    """
    if factory is None and not tools:
        return None
    reply = worker.call(f"{CHILD}:describe", {"factory": factory, "tools": list(tools)})
    if not reply.ok:
        what = f"The environment {factory or ', '.join(tools)} cannot be used: {reply.message}."
        if reply.traceback is None:
            raise ConfigError(f"{what} Name it as file.py:Name or module:Name.")
        raise DataError(f"{what} Fix it, then start again.\n{reply.traceback}")
    kinds = {
        name: Kind(**{**kind, "schemas": tuple(kind["schemas"])})
        for name, kind in reply.value.items()
    }
    return Environments(factory, tuple(tools), kinds, worker, limit_s, warn)


def row_of(example: Example) -> dict[str, Any]:
    """Return what `reset` and agents get: the data columns, with the prompt as messages."""
    messages = [dict(message) for message in example.messages]
    return {"prompt": messages, "answer": example.answer, **example.columns}


def _observed(example: Example, text: str | None) -> Example:
    """The example with the text from `reset` appended to its last message, as in TRL.

    The beginning of the model's turn, if the prompt ends in one, stays as it is.
    """
    place = len(example.messages) - (2 if example.begun else 1)
    message = example.messages[place]
    longer = {**message, "content": message["content"] + readable(text or "")}
    messages = (*example.messages[:place], longer, *example.messages[place + 1 :])
    return replace(example, messages=messages)


def _begun(said: ModelTurn) -> str:
    """The beginning of this turn that the prompt gave; only the first one has any."""
    return said.example.begun if said.conversation is None else ""


def _answers(calls: Sequence[ToolCall], outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that answer a turn; none if the conversation is over."""
    if "results" in outcome:
        return [
            {"role": "tool", "name": call.name, "content": readable(result["text"])}
            for call, result in zip(calls, outcome["results"], strict=True)
        ]
    said = outcome["answer"]
    return [] if said is None else [{"role": "user", "content": readable(said)}]
