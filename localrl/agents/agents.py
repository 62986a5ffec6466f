"""Agents: the user's programs, which call the model that is trained as they would call any other.

A function of the user runs once for each completion, in a thread of the child process that rewards
run in, and is given the address of a server of this process (`server.py`). The server's requests
become the calls of `rollouts/agents.py`. See docs/agents.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from localrl.agents.chat import completion, logprobs_of, read_turn
from localrl.agents.conversations import AgentLimits, Asked, Conversation, TooMuch, messages_of
from localrl.agents.reading import RequestReader
from localrl.agents.server import AgentServer, Request
from localrl.errors import ConfigError, DataError
from localrl.policy.tokenizer import Tokenizer
from localrl.processes.worker import Reply, Worker
from localrl.records import AgentCall, AgentEnd, Example, ModelTurn, RewardSpec, Work
from localrl.rewards.in_process import Outcomes
from localrl.tasks.breakage import Breakage
from localrl.tasks.environments import row_of

CHILD = "localrl.agents.child"

Asking = AgentCall | AgentEnd


@dataclass(frozen=True)
class _Taken:
    """A request that was taken from its agent's tray."""

    request: Request
    asked: Asked
    call: AgentCall


@dataclass(eq=False)
class Agents:
    """The agents of one task. Create them with `open_agents`."""

    target: str
    worker: Worker
    limits: AgentLimits
    warn: Callable[[str], None]
    beat: Callable[[Work], None]
    has_tools: bool = False
    """Always False: tools are the agent's own."""
    _server: AgentServer | None = None
    _reader: RequestReader | None = None
    _numbers: Iterator[int] = field(default_factory=count)
    _talks: dict[int, Conversation] = field(default_factory=dict)
    """Agents at work."""
    _taken: dict[int, _Taken] = field(default_factory=dict)
    _rewards: dict[int, float | None] = field(default_factory=dict)
    """Numbers returned by the agents that have ended since `begin`; None for something else."""
    _hung: bool = False
    """True if the child still runs an agent that was given up."""
    _lost: Reply | None = None
    """The failure of the child, if one ended the last waiting."""

    def __post_init__(self) -> None:
        self._breakage = Breakage("agent", "completions", self.warn)

    @property
    def reward(self) -> RewardSpec:
        """The reward that agents return, named after the function."""
        return RewardSpec(self.target.rpartition(":")[2], self.target)

    @property
    def outcomes(self) -> Mapping[str, Outcomes]:
        """The function of that reward, which is of this process: rewards can kill the agents'."""
        return {self.target: lambda numbers: [self._rewards[number] for number in numbers]}

    def connect(self, tokenizer: Tokenizer) -> None:
        """Connect the agents to a model, and begin to listen on this machine."""
        self._reader = RequestReader(tokenizer, self.warn)
        self._server = AgentServer(len(tokenizer.inner))

    def close(self) -> None:
        """Stop listening, and refuse what waits."""
        if self._server is not None:
            self._drop_calls()
            self._server.server_close()
            self._server = None

    def take_counts(self) -> tuple[int, int]:
        """Return the number of tool calls that the run makes itself: none."""
        return 0, 0

    def begin(self, examples: Sequence[Example], max_completion_tokens: int) -> list[Asking]:
        """Start an agent for each of these examples, and return their first calls.

        Agents that are still at work were left by a step that is made again: they are ended.

        Raises: RewardError if agents break too often.
        """
        self._abandon()
        numbers = [next(self._numbers) for _ in examples]
        self._talks = {n: Conversation(n, max_completion_tokens) for n in numbers}
        self._rewards = {}
        self._listening.open(numbers)
        agents = [
            {"number": number, "example": row_of(example)}
            for number, example in zip(numbers, examples, strict=True)
        ]
        reply = self.worker.resolve(self.target)  # its module may take longer than a call
        if reply.ok:
            given = {"url": self._listening.url, "token": self._listening.token}
            start = {"target": self.target, "agents": agents, **given}
            reply = self.worker.call(f"{CHILD}:start", start)
        if not reply.ok:
            for number in numbers:
                self._listening.end(number, _failed(reply))
        return self._hear(numbers)

    def answer(self, turns: Sequence[ModelTurn]) -> list[Asking]:
        """Hand agents the turns that they called for, and return their next calls.

        Raises: RewardError if agents break too often.
        """
        numbers = []
        for turn in turns:
            number = turn.conversation
            assert number is not None
            numbers.append(number)
            taken, talk = self._taken.pop(number), self._talks[number]
            written = read_turn(self._model, turn, taken.asked.tools, taken.call.stop)
            name = f"{number}-{len(talk.turns)}"
            told = logprobs_of(self._model, turn) if taken.request.body.get("logprobs") else None
            model, read = str(taken.request.body["model"]), len(taken.call.prompt)
            talk.write(turn, written, written.message(name))
            taken.request.answer(completion(name, model, written, turn, read, told))
        return self._hear(numbers)

    @property
    def _model(self) -> Tokenizer:
        assert self._reader is not None, "connect() comes first"
        return self._reader.tokenizer

    @property
    def _listening(self) -> AgentServer:
        assert self._server is not None, "connect() comes first"
        return self._server

    def _hear(self, numbers: Sequence[int]) -> list[Asking]:
        """Wait until each of these agents has called or ended, all at the same time."""
        found: dict[int, Asking] = {}
        errors: list[str] = []
        details = ""
        # Those refused once others hung have their own time, but may not be refused for ever.
        latest = time.monotonic() + 2 * self.limits.seconds
        while waiting := [number for number in numbers if number not in found]:
            self._lost = None
            until = min(time.monotonic() + self.limits.seconds, latest)
            for number in self._listening.wait(waiting, until, self._look):
                self._give_up(number)
            requests: dict[int, Request] = {}
            for number in waiting:
                sent = self._listening.take(number)
                if isinstance(sent, Request):
                    requests[number] = sent
                    continue
                found[number], error = self._end(number, sent)
                errors += [error] if error else []
                details = sent.get("traceback") or details
            found |= self._calls(requests)
        ended = sum(isinstance(one, AgentEnd) for one in found.values())
        if not self._talks:
            self._settle()
        self._breakage.add(errors, ended, details)
        return [found[number] for number in numbers]

    def _look(self) -> bool:
        """Say that the run is alive, and return True if the agents' process is well."""
        self.beat(Work("waiting for agents"))
        self._lost = self.worker.failure()
        return self._lost is None

    def _give_up(self, number: int) -> None:
        """End an agent that has neither called nor ended in time, or has lost its process."""
        late = Reply(message=f"it neither called the model nor ended in {self.limits.seconds:g} s")
        self._hung = self._hung or self._lost is None
        self._listening.end(number, _failed(self._lost or late))

    def _end(self, number: int, sent: Mapping[str, Any]) -> tuple[AgentEnd, str | None]:
        """Return the end of an agent from its report, and its error if it failed.

        One that raises because its call was refused for a limit of the run is not to blame.
        """
        talk = self._talks.pop(number)
        self._listening.close_tray(number)
        value, error = sent.get("value"), sent.get("failure")
        reward, messages = _number(value), talk.transcript
        if error is None and not isinstance(value, str | None) and reward is None:
            given = messages_of(value)
            messages = tuple({**one, "content": one.get("content") or ""} for one in given or ())
            if given is None:
                shown = repr(value)[:60]
                error = f"it returned {shown}; a finite number, text, messages or None are allowed"
        elif isinstance(value, str):
            messages = ({"role": "assistant", "content": value},)
        self._rewards[number] = reward
        text = next((m["content"] for m in messages[::-1] if m["role"] == "assistant"), "")
        if talk.cut and "failure" in sent and not sent.get("lost"):
            error = None
        reason = "error" if error else talk.cut or talk.last
        return AgentEnd(number, reason, text, messages), error

    def _calls(self, requests: Mapping[int, Request]) -> dict[int, Asking]:
        """Return the calls of these requests; those that cannot be made are refused."""
        assert self._reader is not None
        calls: dict[int, Asking] = {}
        for number, asked in self._reader.read(requests):
            request, talk = requests[number], self._talks[number]
            try:
                call = talk.call(asked, self._model, self.limits)
            except TooMuch as error:
                talk.cut = error.reason
                request.refuse(str(error))
            except (DataError, ConfigError, RecursionError) as error:
                request.refuse(str(error))
            else:
                calls[number] = call
                self._taken[number] = _Taken(request, asked, call)
        return calls

    def _settle(self) -> None:
        """End the threads that were given up, which ends with their process. All have ended."""
        if self._hung:
            self.worker.close()
            self._hung = False

    def _abandon(self) -> None:
        """End the agents that are at work, with their process."""
        if self._talks:
            self._listening.close_all()
            self._drop_calls()
            self.worker.close()

    def _drop_calls(self) -> None:
        """Refuse the requests that were taken and will not be answered."""
        for taken in self._taken.values():
            taken.request.refuse("this step is given up", 410)
        self._taken.clear()


def open_agents(
    target: str,
    worker: Worker,
    limits: AgentLimits,
    *,
    warn: Callable[[str], None],
    beat: Callable[[Work], None],
) -> Agents:
    """Open a task's agents. target: their function, as `file.py:name` or `module:name`.

    Raises: ConfigError if there is no such function, or it needs arguments that it is not given;
    DataError if its module fails to import.
    """
    reply = worker.resolve(target)
    if reply.ok:
        reply = worker.call(f"{CHILD}:check", {"target": target})
    if not reply.ok:
        raise _cannot_load(target, reply)
    if reply.value:
        raise ConfigError(
            f"The agent {target} needs {', '.join(map(repr, reply.value))}; it is given example, "
            "base_url and api_key by name. Rename these arguments or give them defaults, and put "
            "none of them before a /."
        )
    return Agents(target, worker, limits, warn, beat)


def _cannot_load(target: str, reply: Reply) -> ConfigError | DataError:
    what = f"The agent {target} cannot be used: {reply.message}."
    if reply.failure == "raised" and reply.traceback is None:
        return ConfigError(f"{what} Name it as file.py:function or module:function.")
    if reply.failure == "memory":
        return DataError(f"{what} Raise task.reward_memory_mb, or let its module load less.")
    return DataError(f"{what} Fix its module, then start again.\n{reply.traceback or ''}".strip())


def _failed(reply: Reply) -> dict[str, Any]:
    """Return the report of an agent that could not report its end itself."""
    return {"failure": reply.message, "traceback": reply.traceback, "lost": True}


def _number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
