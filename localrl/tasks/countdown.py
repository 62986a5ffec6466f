"""Reaching a target with given numbers, each used at most once.

    prompt  Make 42 from the numbers 3, 8 and 50 with +, -, * and /, ...
    answer  50 - 8

There are many right answers; the reward checks the expression. Every problem can be solved: its
target was reached by working through the numbers from left to right.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from localrl.tasks.base import RewardSpec
from localrl.tasks.family import REASON, Operands

NAME = "countdown"
DIFFICULTIES = (1, 2, 3, 4)
"""Levels: one less than the number of given numbers."""
REWARD = RewardSpec("countdown", "localrl.rewards.countdown:countdown_reward")

LARGEST_NUMBER = 99
LARGEST_TARGET = 999

State = tuple[int, tuple[int, ...]]
"""A value reached so far, and the remaining numbers."""


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: the target, then the numbers in ascending order."""
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(difficulty + 1)]
        target = numbers[0]
        for number in numbers[1:]:
            target = rng.choice([value for _, value in _steps(target, number)])
        if 0 < target <= LARGEST_TARGET and target not in numbers:
            return (str(target), *map(str, sorted(numbers)))


def prompt(operands: Operands) -> str:
    """The user's message."""
    target, *numbers = operands
    given = f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    return (
        f"Make {target} from the numbers {given}, with +, -, *, / and brackets. Use each number at "
        f'most once. {REASON} "Answer: " followed by the expression.'
    )


def answer(operands: Operands) -> str:
    """One expression that reaches the target; there may be others."""
    target, *numbers = map(int, operands)
    dead_ends: set[State] = set()
    for i, number in enumerate(numbers):
        steps = _solve(target, number, (*numbers[:i], *numbers[i + 1 :]), dead_ends)
        if steps:
            return _written(number, steps)
    raise ValueError(f"{operands} has no solution from left to right")


def columns(operands: Operands) -> dict[str, Any]:
    """The target and numbers that the reward checks an expression against."""
    target, *numbers = map(int, operands)
    return {"target": target, "numbers": numbers}


def _steps(value: int, number: int) -> Iterator[tuple[str, int]]:
    """Yield the operations whose result is a whole number, with that result."""
    yield "+", value + number
    yield "-", value - number
    yield "*", value * number
    if value % number == 0:
        yield "/", value // number


def _solve(
    target: int, value: int, rest: tuple[int, ...], dead_ends: set[State]
) -> tuple[tuple[str, int], ...]:
    """Find operations, with their numbers, that lead from `value` to the target; empty if none."""
    if (value, rest) in dead_ends:
        return ()
    for i, number in enumerate(rest):
        others = rest[:i] + rest[i + 1 :]
        for sign, result in _steps(value, number):
            if result == target:
                return ((sign, number),)
            if others and (found := _solve(target, result, others, dead_ends)):
                return ((sign, number), *found)
    dead_ends.add((value, rest))
    return ()


def _written(number: int, steps: tuple[tuple[str, int], ...]) -> str:
    """The expression, with brackets where a sum or difference is multiplied or divided."""
    text, before = str(number), "*"
    for sign, operand in steps:
        if sign in "*/" and before in "+-":
            text = f"({text})"
        text, before = f"{text} {sign} {operand}", sign
    return text
