"""The tasks that ship with the package: generated problems, endless or a fixed number of them.

Hold-out rule: see `held_out`. The embedded model was trained under the same rule, so evaluation
problems were seen by neither its training nor by reinforcement learning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import count, islice
from random import Random
from types import ModuleType
from typing import Literal

from localrl.errors import ConfigError
from localrl.records import Example
from localrl.tasks import sorting, sums
from localrl.tasks.base import RewardSpec

Stream = Literal["base", "train", "evaluation"]
"""Who draws: the embedded model's own training, reinforcement learning, or evaluation."""

EXACT_ANSWER = RewardSpec("final_answer", "localrl.rewards.answers:final_answer")

FAMILIES: dict[str, tuple[ModuleType, ...]] = {
    "steps": (sums, sorting),
    "sums": (sums,),
    "sorting": (sorting,),
}

DESCRIPTIONS = {
    "steps": "sums and sorting in turn, worked step by step; made for the embedded model",
    "sums": "add four to six two-digit numbers",
    "sorting": "put four to six different letters in alphabetical order",
}


def held_out(family: str, operands: tuple[str, ...]) -> bool:
    """Whether a problem belongs to evaluation only.

    The operands are sorted first, so every permutation of a problem falls on the same side. A
    problem is held out when the SHA-256 of `family:operand,operand,...`, read as a big-endian
    integer, is divisible by 8: one problem in eight.
    """
    canonical = f"{family}:{','.join(sorted(operands))}"
    return hashlib.sha256(canonical.encode()).digest()[-1] % 8 == 0


def draw_problem(
    families: tuple[ModuleType, ...], stream: Stream, index: int
) -> Iterator[tuple[ModuleType, int, tuple[str, ...]]]:
    """Yield candidates for problem `index` of a stream as (family, difficulty, operands).

    Families and difficulties take turns, so any run of `len(families) * 3` problems is balanced.
    The first candidate is the problem; the next ones serve when it must not repeat an earlier one.
    """
    turn, which = divmod(index, len(families))
    family = families[which]
    difficulty = family.DIFFICULTIES[turn % len(family.DIFFICULTIES)]
    rng = Random(f"{family.NAME}/{stream}/{index}")
    while True:
        operands = family.draw(rng, difficulty)
        if held_out(family.NAME, operands) == (stream == "evaluation"):
            yield family, difficulty, operands


def to_example(
    family: ModuleType, difficulty: int, operands: tuple[str, ...], *, endless: bool
) -> Example:
    """The record of one problem; endless tasks are tracked by family and difficulty."""
    kind = f"{family.NAME}/{difficulty}"
    return Example(
        id=f"{kind}/{'-'.join(operands)}",
        messages=({"role": "user", "content": family.prompt(operands)},),
        answer=family.answer(operands),
        columns={"family": family.NAME, "difficulty": difficulty},
        tracker_key=kind if endless else "",
    )


@dataclass(frozen=True)
class BuiltinTask:
    """A generated task over one or more families; satisfies `tasks.base.Task`."""

    name: str
    train_size: int

    rewards: tuple[RewardSpec, ...] = (EXACT_ANSWER,)

    @property
    def description(self) -> str:
        """One line for a person."""
        return DESCRIPTIONS[self.name]

    def train(self, index: int) -> Example:
        """Training example `index`; with a fixed `train_size` all examples are different."""
        if self.train_size:
            return self._fixed[index]
        problem = next(draw_problem(FAMILIES[self.name], "train", index))
        return to_example(*problem, endless=True)

    def evaluation(self, n: int) -> list[Example]:
        """The first `n` of the held-out list, all different, the same for every run and seed."""
        return list(islice(self._distinct("evaluation", endless=not self.train_size), n))

    @cached_property
    def _fixed(self) -> list[Example]:
        return list(islice(self._distinct("train", endless=False), self.train_size))

    def _distinct(self, stream: Stream, *, endless: bool) -> Iterator[Example]:
        seen: set[str] = set()
        for index in count():
            for problem in draw_problem(FAMILIES[self.name], stream, index):
                example = to_example(*problem, endless=endless)
                if example.id not in seen:
                    seen.add(example.id)
                    yield example
                    break


def load_task(name: str, *, train_prompts: int) -> BuiltinTask:
    """The built-in task of that name with `train_prompts` fixed training problems; 0 is endless.

    Raises `ConfigError` for an unknown name or a negative count.
    """
    if train_prompts < 0:
        raise ConfigError(f"train_prompts is {train_prompts}; give 0 for endless, or a count.")
    if name not in FAMILIES:
        close = get_close_matches(name, FAMILIES, n=1, cutoff=0.0)
        raise ConfigError(
            f"Unknown task {name!r}; did you mean {close[0]!r}? "
            f"Built-in tasks: {', '.join(FAMILIES)}."
        )
    return BuiltinTask(name, train_prompts)


def list_tasks() -> dict[str, str]:
    """Names of the built-in tasks and what each asks for, the demonstration's task first."""
    return dict(DESCRIPTIONS)
