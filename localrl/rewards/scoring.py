"""Rewards for groups of completions: each reward function is called once for all of them.

Reward functions have TRL's signature: keyword lists with one entry per completion, and a list of
numbers or None as the result. They run in a `Worker`. A failure is "no reward" (None), never 0:
a zero would teach the model that the completions were bad.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from localrl.errors import ConfigError, DataError, RewardError
from localrl.records import Example, Group, ScoredGroup
from localrl.worker import Reply, Worker

ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "answer")

# A function is not trusted any more when, of its last WINDOW calls, more than TOLERATED of the
# completions got no reward through its failures: judged from MIN_CALLS calls on, or from
# HOPELESS_CALLS on when not one completion has got a reward yet.
WINDOW = 50
TOLERATED = 0.2
MIN_CALLS = 10
HOPELESS_CALLS = 3


logger = logging.getLogger(__name__)


class RewardLike(Protocol):
    """What scoring needs to know of a reward function."""

    @property
    def name(self) -> str: ...
    @property
    def target(self) -> str:
        """`module:function` or `path/to/file.py:function`."""
        ...

    @property
    def weight(self) -> float: ...


class Counts(NamedTuple):
    """Calls of one reward function, and how many of them left some completion without a reward."""

    calls: int
    failures: int


@dataclass(frozen=True)
class _Outcome:
    """One call: a value per completion, and what went wrong first."""

    values: tuple[float | None, ...]
    failed: int = 0
    kind: str = ""
    problem: str = ""
    traceback: str | None = None


@dataclass
class _History:
    """What is remembered of one function's calls."""

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
        """Share of failed completions over the window, each call counting alike."""
        return sum(self.shares) / len(self.shares)

    @property
    def hopeless(self) -> bool:
        if self.calls < MIN_CALLS:
            return self.calls >= HOPELESS_CALLS and self.share == 1.0
        return self.share > TOLERATED


class Scorer:
    """Scores groups with weighted reward functions, and keeps count of their failures.

    warn: gets one line for the first failure of each kind of each function.

    Raises:
        ConfigError: no function, two of one name, or a weight that is not a finite number.
    """

    def __init__(
        self,
        specs: Sequence[RewardLike],
        worker: Worker,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        names = [spec.name for spec in specs]
        if not specs:
            raise ConfigError("There is no reward function; name one as module:function.")
        if len(set(names)) < len(names):
            raise ConfigError(f"Reward functions need different names; these are {names}.")
        for spec in specs:
            if not math.isfinite(spec.weight):
                raise ConfigError(f"Reward {spec.name!r} has weight {spec.weight}; give a number.")
        self._specs = tuple(specs)
        self._worker = worker
        self._warn = warn
        self._histories = {name: _History() for name in names}

    @property
    def counts(self) -> Mapping[str, Counts]:
        """Calls and failures so far, by function."""
        return {name: Counts(h.calls, h.failures) for name, h in self._histories.items()}

    def check(self, columns: Iterable[str] | None = None) -> None:
        """Import every reward function now, so that a run does not start with a broken one.

        columns: names of the task's columns, to find arguments that nothing will fill; None when
            they are not known.

        Raises:
            ConfigError: no such module, file or function, or it needs an unknown column.
            DataError: its module fails when imported.
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
                        f"{missing[0]!r}; this task gives {', '.join(sorted(known))}. "
                        "Rename the argument, give it a default, or add the column to the data."
                    )

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Rewards of all leaves of all groups; each function is called once.

        Raises:
            RewardError: a function has failed too often, see `WINDOW`.
            DataError: a column of the task holds what cannot be sent to the functions.
        """
        arguments = call_arguments(groups)
        count = len(arguments["completions"])
        parts = {spec.name: self._part(spec, arguments, count) for spec in self._specs}
        scored, start = [], 0
        for group in groups:
            stop = start + len(group.leaves)
            own = {name: values[start:stop] for name, values in parts.items()}
            rewards = tuple(self._total(leaf) for leaf in zip(*own.values(), strict=True))
            scored.append(ScoredGroup(group, rewards, own))
            start = stop
        return scored

    def _part(
        self, spec: RewardLike, arguments: Mapping[str, Any], count: int
    ) -> tuple[float | None, ...]:
        if not count:
            return ()
        outcome = _read(self._worker.call(spec.target, arguments), count)
        history = self._histories[spec.name]
        history.add(outcome)
        if outcome.failed and outcome.kind not in history.warned:
            history.warned.add(outcome.kind)
            self._warn(
                f"Reward {spec.name!r} ({spec.target}): {outcome.problem}. "
                f"{outcome.failed} of {count} completions get no reward from it. "
                "More failures of this kind are counted, not shown."
            )
        if history.hopeless:
            raise _too_many_failures(spec, history)
        return outcome.values

    def _total(self, leaf: Sequence[float | None]) -> float | None:
        """Weighted sum of the parts that apply; None when none does, or when it overflows."""
        terms = [
            spec.weight * part
            for spec, part in zip(self._specs, leaf, strict=True)
            if part is not None
        ]
        total = sum(terms)
        return total if terms and math.isfinite(total) else None


def call_arguments(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function, each a list with one entry per leaf.

    `prompts` are lists of chat messages, `completions` lists with one assistant message,
    `completion_ids` lists of tokens; then `answer` and the columns of the examples, None where an
    example lacks one.
    """
    leaves = [(group, index) for group in groups for index in range(len(group.leaves))]
    columns = dict.fromkeys(name for group in groups for name in group.example.columns)
    given = {name: [group.example.columns.get(name) for group, _ in leaves] for name in columns}
    return given | {
        "answer": [_gold(group.example) for group, _ in leaves],
        "prompts": [[dict(m) for m in group.example.messages] for group, _ in leaves],
        "completions": [
            [{"role": "assistant", "content": group.leaves[index].text}] for group, index in leaves
        ],
        "completion_ids": [group.completion(index).token_ids.tolist() for group, index in leaves],
    }


def _gold(example: Example) -> Any:
    return example.columns.get("answer") if example.answer is None else example.answer


def _read(reply: Reply, count: int) -> _Outcome:
    """The numbers in a reply; whatever is not a finite number or None has failed."""
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
    problem = f"it returned {_short(wrong[0])}, which is neither a finite number nor None"
    return _Outcome(numbers, len(wrong), "value", problem)


def _number(value: object) -> float | None:
    """A finite number as float; bool counts as 0 or 1; None for all else."""
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
        return ConfigError(f"{what} Name it as module:function or path/to/file.py:function.")
    return DataError(f"{what} Mend its module, then start again.\n{reply.traceback or ''}".strip())


def _too_many_failures(spec: RewardLike, history: _History) -> RewardError:
    assert history.first is not None
    cause = history.first.traceback or history.first.problem
    return RewardError(
        f"Reward {spec.name!r} ({spec.target}) gave no reward for {history.share:.0%} of the "
        f"completions of its last {len(history.shares)} calls, because it failed. Mend the "
        f"function or raise its limits, then start again. The first failure was:\n{cause}"
    )
