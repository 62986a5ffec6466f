"""The tasks that ship with the package: generated problems, endless or a fixed number of them.

For the hold-out rule see `held_out`. The embedded model was trained under the same rule, so
evaluation problems occur neither in its training nor in reinforcement learning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from random import Random
from types import ModuleType
from typing import Literal

from localrl.errors import ConfigError
from localrl.records import Example
from localrl.tasks import (
    arithmetic,
    bases,
    calculator,
    choice,
    countdown,
    dates,
    extraction,
    functions,
    guessing,
    reversal,
    sorting,
    sums,
    units,
)
from localrl.tasks.base import RewardSpec
from localrl.tasks.family import (
    EXACT_ANSWER,
    columns_of,
    environment_of,
    held_out_as,
    needs_sandbox,
    reward_of,
)
from localrl.tasks.levels import parse_name, span

Stream = Literal["base", "train", "evaluation"]
"""Use of the problems: the embedded model's training, reinforcement learning, or evaluation."""

FAMILIES: dict[str, tuple[ModuleType, ...]] = {
    "steps": (sums, sorting),
    "sums": (sums,),
    "sorting": (sorting,),
    "arithmetic": (arithmetic,),
    "countdown": (countdown,),
    "reversal": (reversal,),
    "bases": (bases,),
    "dates": (dates,),
    "units": (units,),
    "extraction": (extraction,),
    "choice": (choice,),
    "functions": (functions,),
    "guessing": (guessing,),
    "calculator": (calculator,),
}

DESCRIPTIONS = {
    "steps": "sums and sorting in turn, worked step by step; made for the embedded model",
    "sums": "add four to six two-digit numbers",
    "sorting": "put four to six different letters in alphabetical order",
    "arithmetic": "expressions with + - * and brackets, in symbols or words",
    "countdown": "reach a target with given numbers, each used at most once",
    "reversal": "write a string backwards",
    "bases": "convert numbers between bases 2, 8, 10 and 16",
    "dates": "days of the week, dates, days between dates, in words",
    "units": "convert units of length, mass, volume and time, in words",
    "extraction": "facts from a text as a JSON object with given keys",
    "choice": "multiple choice of arithmetic, dates and units",
    "functions": "write a small Python function; its tests need a sandbox",
    "guessing": "guess a number in several turns; each guess is answered with higher or lower",
    "calculator": "products of large numbers, with a calculator as a tool",
}

DRAWS = 20_000
"""Number of draws after which a level counts as exhausted."""


def held_out(family: str, operands: tuple[str, ...]) -> bool:
    """True if a problem is reserved for evaluation.

    The operands are sorted first, so all permutations of a problem fall on the same side. A
    problem is held out if the SHA-256 of `family:operand,operand,...`, read as a big-endian
    integer, is divisible by 8: one problem in eight.
    """
    canonical = f"{family}:{','.join(sorted(operands))}"
    return hashlib.sha256(canonical.encode()).digest()[-1] % 8 == 0


def draw_problem(
    families: tuple[ModuleType, ...],
    stream: Stream,
    index: int,
    levels: tuple[int, ...] | None = None,
) -> Iterator[tuple[ModuleType, int, tuple[str, ...]]]:
    """Yield candidates for problem `index` of a stream as (family, difficulty, operands).

    Families and difficulties alternate, so a stream is balanced; `levels` are the difficulties
    used, or None for all. The first candidate is the problem; the next ones replace it if it
    repeats an earlier one. There are none after `DRAWS` draws.
    """
    turn, which = divmod(index, len(families))
    family = families[which]
    among: tuple[int, ...] = levels or family.DIFFICULTIES
    difficulty = among[turn % len(among)]
    rng = Random(f"{family.NAME}/{stream}/{index}")
    for _ in range(DRAWS):
        operands = family.draw(rng, difficulty)
        if held_out(*held_out_as(family, operands)) == (stream == "evaluation"):
            yield family, difficulty, operands


def to_example(
    family: ModuleType, difficulty: int, operands: tuple[str, ...], *, endless: bool
) -> Example:
    """Make the record of one problem; endless tasks are tracked by family and difficulty."""
    kind = f"{family.NAME}/{difficulty}"
    return Example(
        id=f"{kind}/{'-'.join(operands)}",
        messages=({"role": "user", "content": family.prompt(operands)},),
        answer=family.answer(operands),
        columns={
            "family": family.NAME,
            "difficulty": difficulty,
            **columns_of(family, operands),
        },
        tracker_key=kind if endless else "",
    )


@dataclass(frozen=True)
class BuiltinTask:
    """A generated task over one or more families; satisfies `tasks.base.Task`."""

    name: str
    train_size: int
    rewards: tuple[RewardSpec, ...] = (EXACT_ANSWER,)
    levels: tuple[int, ...] | None = None
    """The difficulties used; None for all."""

    @property
    def families(self) -> tuple[ModuleType, ...]:
        """The modules that generate its problems, in turn."""
        return FAMILIES[self.name.partition(":")[0]]

    @property
    def description(self) -> str:
        """One-line description for users."""
        text = DESCRIPTIONS[self.name.partition(":")[0]]
        return f"{text}; only {span(self.levels)}" if self.levels else text

    @property
    def needs_sandbox(self) -> bool:
        """True if scoring an answer runs code that the model wrote."""
        return any(map(needs_sandbox, self.families))

    @property
    def environment(self) -> str | None:
        """`module:Class` of the environment that all its families share, or None."""
        return environment_of(self.families[0])

    def train(self, index: int) -> Example:
        """Training example `index`; with a fixed `train_size` all examples are different.

        Raises: ConfigError if there are fewer than `train_size` different ones.
        """
        if self.train_size:
            return self._fixed[index]
        problem = next(draw_problem(self.families, "train", index, self.levels))
        return to_example(*problem, endless=True)

    def evaluation(self, n: int) -> list[Example]:
        """The first `n` held-out examples, all different, the same for every run and seed.

        Raises: ConfigError if there are fewer than `n` different ones.
        """
        return list(islice(self._distinct("evaluation", endless=not self.train_size), n))

    @cached_property
    def _fixed(self) -> list[Example]:
        return list(islice(self._distinct("train", endless=False), self.train_size))

    def _distinct(self, stream: Stream, *, endless: bool) -> Iterator[Example]:
        seen: set[str] = set()
        for index in count():
            yield to_example(*self._unseen(stream, index, seen), endless=endless)

    def _unseen(
        self, stream: Stream, index: int, seen: set[str]
    ) -> tuple[ModuleType, int, tuple[str, ...]]:
        """Problem `index` of a stream, or its first replacement not yet seen.

        Two problems are the same if their prompts are; with an environment, which may keep the
        answer back, if their answers are too.
        """
        for problem in draw_problem(self.families, stream, index, self.levels):
            source, _, operands = problem
            told = source.prompt(operands) + (source.answer(operands) if self.environment else "")
            if told not in seen:
                seen.add(told)
                return problem
        which = "held-out" if stream == "evaluation" else "training"
        raise ConfigError(
            f"Task {self.name!r} does not have {index + 1} different {which} problems: after "
            f"{index}, one level ran out. Ask for fewer, or for higher levels only."
        )


def load_task(name: str, *, train_prompts: int) -> BuiltinTask:
    """Load a built-in task with `train_prompts` fixed training problems; 0 is endless.

    `name` may end in a level or a range of levels: countdown:3, countdown:2-4.

    Raises `ConfigError` for an unknown name or level, or a negative count.
    """
    if train_prompts < 0:
        raise ConfigError(f"train_prompts is {train_prompts}; use a count, or 0 for endless.")
    known = {task: families[0].DIFFICULTIES for task, families in FAMILIES.items()}
    task, levels = parse_name(name, known)
    rewards = dict.fromkeys(reward_of(source) for source in FAMILIES[task])
    return BuiltinTask(name, train_prompts, tuple(filter(None, rewards)), levels)


def list_tasks() -> dict[str, str]:
    """Names and descriptions of the built-in tasks, the demonstration's task first."""
    return {
        name: f"{text} ({span(FAMILIES[name][0].DIFFICULTIES)})"
        for name, text in DESCRIPTIONS.items()
    }
