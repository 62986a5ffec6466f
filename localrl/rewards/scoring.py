"""Scores groups of completions: each reward function is called once for all of them.

Reward functions have TRL's signature: keyword lists with one entry per completion, and a list of
numbers or None as the result; see docs/rewards.md. They run in a `Worker`. A failure is "no
reward" (None), never 0: a zero would teach the model that the completions were bad.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from localrl.errors import ConfigError, DataError, RewardError
from localrl.processes.worker import Reply
from localrl.records import ENVIRONMENT_LOOKUP, Group, Leaf, ScoredGroup, Work
from localrl.rewards.arguments import Render, call_arguments
from localrl.rewards.logs import LogCollector, Logs
from localrl.utils.text import one_line

HOOKS = ("trainer_state", "log_extra", "log_metric")
ALWAYS_GIVEN = (
    *("prompts", "rendered_prompts", "completions", "completion_ids", "answer", "environments"),
    *HOOKS,
)

NO_STATE: Mapping[str, Any] = {"global_step": 0, "max_steps": 0, "epoch": None}
"""The `trainer_state` before training, as in TRL."""

# A function stops the run when, over its last WINDOW calls, more than TOLERATED of the
# completions got no reward because it failed: judged from MIN_CALLS calls on, or from
# HOPELESS_CALLS on if no completion has got a reward yet.
WINDOW = 50
TOLERATED = 0.2
MIN_CALLS = 10
HOPELESS_CALLS = 3
TOLD = 500
"""Most characters shown of a text in place of a number."""


logger = logging.getLogger(__name__)


class RewardLike(Protocol):
    """A reward function as scoring needs it."""

    @property
    def name(self) -> str: ...
    @property
    def target(self) -> str:
        """`module:function` or `path/to/file.py:function`; for a factory with `(key=value)`."""
        ...

    @property
    def weight(self) -> float: ...
    @property
    def seconds_each(self) -> float | None:
        """Seconds allowed for each completion; None for the worker's limit of a call."""
        ...


class Caller(Protocol):
    """Calls functions by target, as `Worker` does."""

    def resolve(self, target: str) -> Reply: ...
    def wants(self, target: str, name: str) -> bool: ...
    def call(
        self,
        target: str,
        kwargs: Mapping[str, Any],
        *,
        state: Mapping[str, Any] | None = None,
        through: Mapping[str, str] | None = None,
        limit_s: float | None = None,
        waiting: Callable[[], None] = ...,
    ) -> Reply: ...


class Counts(NamedTuple):
    """Number of calls of one reward function, and of those that left a completion unrewarded."""

    calls: int
    failures: int


@dataclass(frozen=True)
class Tally:
    """A reward function's call history, as a resumed run needs it."""

    calls: int
    failures: int
    shares: tuple[float, ...]
    """Share of failed completions in each of the last calls."""


@dataclass(frozen=True)
class _Outcome:
    """The result of one call: a value per completion, and the first problem."""

    values: tuple[float | None, ...]
    failed: int = 0
    kind: str = ""
    problem: str = ""
    traceback: str | None = None


@dataclass
class _History:
    """History of one function's calls."""

    calls: int = 0
    failures: int = 0
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first: _Outcome | None = None
    warned: set[str] = field(default_factory=set)

    def add(self, outcome: _Outcome) -> None:
        self.calls += 1
        self.failures += outcome.failed > 0
        self.shares.append(outcome.failed / len(outcome.values))
        quotable = outcome.traceback and not (self.first and self.first.traceback)
        if outcome.failed and (self.first is None or quotable):
            self.first = outcome

    @property
    def share(self) -> float:
        """Share of failed completions over the window, all calls weighted equally."""
        return sum(self.shares) / len(self.shares)

    @property
    def hopeless(self) -> bool:
        if self.calls < MIN_CALLS:
            return self.calls >= HOPELESS_CALLS and self.share == 1.0
        return self.share > TOLERATED


class Scorer:
    """Scores groups with weighted reward functions and counts their failures.

    warn: called with one line for the first failure of each kind of each function.
    cut_reward: reward of completions cut off for length or looping, in place of the functions'
        result; None to use that.
    beat: called before each call of a function and while it lasts; it may raise to end the scoring.
    scores: False if nothing will be scored, so that no function is needed.

    Raises:
        ConfigError: no function, two with the same name, or a weight that is not finite.
    """

    def __init__(
        self,
        specs: Sequence[RewardLike],
        worker: Caller,
        warn: Callable[[str], None] = logger.warning,
        *,
        cut_reward: float | None = None,
        beat: Callable[[Work], None] = lambda work: None,
        scores: bool = True,
    ) -> None:
        names = [spec.name for spec in specs]
        if scores and not specs:
            raise ConfigError("No reward function is given; name one as module:function.")
        if len(set(names)) < len(names):
            raise ConfigError(f"Reward functions must have different names; these are {names}.")
        for spec in specs:
            if not math.isfinite(spec.weight):
                raise ConfigError(f"Reward {spec.name!r} has weight {spec.weight}; give a number.")
        self._specs = tuple(specs)
        self._worker = worker
        self._warn = warn
        self._cut_reward = cut_reward
        self._beat = beat
        self._logs = LogCollector(warn)
        self.state = NO_STATE
        """Default for `trainer_state` if `score` is given none."""
        self.render: Render = lambda prompt_ids: ""
        """Turns a prompt's tokens into the text that the model saw, special tokens by name; set by
        whoever knows the model."""
        self.busy_s = 0.0
        """Seconds spent in `score`."""
        self._histories = {name: _History() for name in names}

    @property
    def counts(self) -> Mapping[str, Counts]:
        """Calls and failures so far, by function."""
        return {name: Counts(h.calls, h.failures) for name, h in self._histories.items()}

    def tallies(self) -> dict[str, Tally]:
        """Call histories so far, by function."""
        return {n: Tally(h.calls, h.failures, tuple(h.shares)) for n, h in self._histories.items()}

    def restore(self, tallies: Mapping[str, Tally]) -> None:
        """Restore the call histories of an earlier process."""
        for name, tally in tallies.items():
            history = self._histories[name]
            history.calls, history.failures = tally.calls, tally.failures
            history.shares.clear()
            history.shares.extend(tally.shares)

    def check(self, columns: Iterable[str] | None = None) -> None:
        """Import every reward function now, so that a run does not start with a broken one.

        columns: names of the task's columns, to find arguments that nothing will fill; None if
            they are not known.

        Raises:
            ConfigError: no such module, file or function, or it needs an unknown column.
            DataError: its module fails to import.
        """
        for spec in self._specs:
            reply = self._worker.resolve(spec.target)
            if not reply.ok:
                raise _cannot_load(spec, reply)
            if columns is not None:
                known = {*ALWAYS_GIVEN, *columns}
                missing = [name for name in reply.value if name not in known]
                if missing:
                    raise ConfigError(
                        f"Reward {spec.name!r} ({spec.target}) needs the column "
                        f"{missing[0]!r}; this task has {', '.join(sorted(known))}. "
                        "Rename the argument, give it a default, or add the column to the data."
                    )

    def score(
        self, groups: Sequence[Group], state: Mapping[str, Any] | None = None
    ) -> list[ScoredGroup]:
        """Score all leaves of all groups; each function is called once.

        state: attributes of `trainer_state`; `self.state` by default.

        Raises:
            RewardError: a function has failed too often, see `WINDOW`.
            DataError: a task column holds values that cannot be sent to the functions.
        """
        started = time.perf_counter()
        render = self.render if self._wanted("rendered_prompts") else None
        arguments = call_arguments(groups, ids=self._wanted("completion_ids"), render=render)
        state = self.state if state is None else state
        rows = [(group.example.id, leaf.text) for group in groups for leaf in group.leaves]
        parts = {spec.name: self._part(spec, arguments, state, rows) for spec in self._specs}
        scored, start = [], 0
        for group in groups:
            stop = start + len(group.leaves)
            own = {name: values[start:stop] for name, values in parts.items()}
            rewards = tuple(
                self._reward(leaf, values)
                for leaf, values in zip(group.leaves, zip(*own.values(), strict=True), strict=True)
            )
            scored.append(ScoredGroup(group, rewards, own))
            start = stop
        self.busy_s += time.perf_counter() - started
        return scored

    def _wanted(self, name: str) -> bool:
        return any(self._worker.wants(spec.target, name) for spec in self._specs)

    def take_logs(self) -> Logs:
        """Return everything the functions logged since the last call. Call it after each step."""
        return self._logs.take()

    def _reward(self, leaf: Leaf, parts: Sequence[float | None]) -> float | None:
        if leaf.finish_reason == "error":
            return None
        cut = leaf.finish_reason in ("length", "loop")
        return self._cut_reward if cut and self._cut_reward is not None else self._total(parts)

    def _part(
        self,
        spec: RewardLike,
        arguments: Mapping[str, Any],
        state: Mapping[str, Any],
        rows: Sequence[tuple[str, str]],
    ) -> tuple[float | None, ...]:
        work = Work(f"scoring with {spec.name}")
        self._beat(work)
        if not rows:
            return ()
        through = {"environments": ENVIRONMENT_LOOKUP} if "environments" in arguments else None
        count = len(rows)
        reply = self._worker.call(
            spec.target,
            arguments,
            state=state,
            through=through,
            limit_s=None if spec.seconds_each is None else spec.seconds_each * count,
            waiting=lambda: self._beat(work),
        )
        outcome = _read(reply, count)
        self._logs.add(spec.name, reply.logs, rows)
        history = self._histories[spec.name]
        history.add(outcome)
        if outcome.failed and outcome.kind not in history.warned:
            history.warned.add(outcome.kind)
            self._warn(
                f"Reward {spec.name!r} ({spec.target}): {outcome.problem}. "
                f"{outcome.failed} of {count} completions get no reward from it. "
                "Further failures of this kind are counted but not shown."
            )
        if history.hopeless:
            raise _too_many_failures(spec, history)
        return outcome.values

    def _total(self, leaf: Sequence[float | None]) -> float | None:
        """Weighted sum of the parts that apply; None if none does, or if it overflows."""
        terms = [
            spec.weight * part
            for spec, part in zip(self._specs, leaf, strict=True)
            if part is not None
        ]
        total = sum(terms)
        return total if terms and math.isfinite(total) else None


def _read(reply: Reply, count: int) -> _Outcome:
    """Read the numbers in a reply; anything but a finite number or None counts as failed."""
    nothing = (None,) * count
    if reply.failure is not None:
        problem = f"{reply.failure}: {reply.message}"
        return _Outcome(nothing, count, reply.failure, problem, reply.traceback)
    values = reply.value
    if not isinstance(values, list):
        problem = f"it returned {_short(values)}, not a list of {count} numbers"
        return _Outcome(nothing, count, "shape", problem)
    if len(values) != count:
        problem = f"it returned {len(values)} values for {count} completions"
        return _Outcome(nothing, count, "shape", problem)
    numbers = tuple(_number(value) for value in values)
    pairs = zip(values, numbers, strict=True)
    wrong = [v for v, number in pairs if v is not None and number is None]
    if not wrong:
        return _Outcome(numbers)
    if isinstance(wrong[0], str) and " " in wrong[0]:  # a reason
        told = f"it gave no number: {one_line(wrong[0], TOLD)}"
        return _Outcome(numbers, len(wrong), "told", told)
    problem = f"it returned {_short(wrong[0])}, which is neither a finite number nor None"
    return _Outcome(numbers, len(wrong), "value", problem)


def _number(value: object) -> float | None:
    """Convert a finite number to float, bools to 0 or 1; None for anything else."""
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cannot_load(spec: RewardLike, reply: Reply) -> ConfigError | DataError:
    what = f"Reward {spec.name!r} ({spec.target}) cannot be loaded: {reply.message}."
    if reply.failure == "raised" and reply.traceback is None:
        return ConfigError(
            f"{what} Name it as module:function or path/to/file.py:function; give a factory its "
            "settings, as in module:factory(key=value)."
        )
    return DataError(f"{what} Fix its module, then start again.\n{reply.traceback or ''}".strip())


def _too_many_failures(spec: RewardLike, history: _History) -> RewardError:
    first = history.first
    cause = first.traceback or first.problem if first else "before the run was resumed."
    return RewardError(
        f"Reward {spec.name!r} ({spec.target}) gave no reward for {history.share:.0%} of the "
        f"completions in its last {len(history.shares)} calls because it failed. Fix the "
        f"function or raise its limits, then start again. The first failure was:\n{cause}"
    )
