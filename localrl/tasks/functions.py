"""Small Python functions, scored by tests that run them: only for use with a sandbox.

    prompt  Write a Python function `solve(numbers)` ... the sum of the even numbers, each times 3.
    answer  def solve(numbers): ...

The operands are the function's steps in order, each a word and its number: divisible2 times3 sum.
On level 1 the function takes one number, above that a list.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from string import digits
from typing import Any, NamedTuple

from localrl.tasks.base import RewardSpec
from localrl.tasks.family import Operands

NAME = "functions"
DIFFICULTIES = (1, 2, 3, 4)
REWARD = RewardSpec("code", "localrl.rewards.code:code_reward")
SANDBOX = True

TESTS = 8
DIFFERENT = 5
"""Minimum number of different results among a function's tests, so that a constant fails."""


class Step(NamedTuple):
    """One step: as a Python expression, in words, and as a function."""

    code: str
    words: str
    run: Callable[[Any, int], Any]


MAPS = {
    "add": Step("x + {k}", "increased by {k}", lambda x, k: x + k),
    "subtract": Step("x - {k}", "decreased by {k}", lambda x, k: x - k),
    "times": Step("x * {k}", "multiplied by {k}", lambda x, k: x * k),
    "modulo": Step("x % {k}", "replaced by its remainder modulo {k}", lambda x, k: x % k),
}
FILTERS = {
    "above": Step("x > {k}", "greater than {k}", lambda x, k: x > k),
    "below": Step("x < {k}", "less than {k}", lambda x, k: x < k),
    "divisible": Step("x % {k} == 0", "divisible by {k}", lambda x, k: x % k == 0),
    "indivisible": Step("x % {k} != 0", "not divisible by {k}", lambda x, k: x % k != 0),
}
REDUCTIONS = {
    "sum": Step("sum(numbers)", "the sum", lambda xs, _: sum(xs)),
    "largest": Step("max(numbers, default=0)", "the largest", lambda xs, _: max(xs, default=0)),
    "smallest": Step("min(numbers, default=0)", "the smallest", lambda xs, _: min(xs, default=0)),
    "sorted": Step("sorted(numbers)", "the sorted list", lambda xs, _: sorted(xs)),
}
FILTER_KINDS = (("above", "below"), ("divisible", "indivisible"))
MAP_KINDS = (("add", "subtract"), ("times",), ("modulo",))
"""A function has at most one step of each kind, so that none undoes or empties another."""
SHAPES = {1: (0, 2), 2: (1, 1), 3: (2, 1), 4: (2, 2)}
"""Numbers of filters and maps by level; every level except the first ends with a reduction."""


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: the steps, each a word and its number."""
    filters, maps = SHAPES[difficulty]
    while True:
        names = [rng.choice(kind) for kind in rng.sample(FILTER_KINDS, filters)]
        steps = [f"{name}{rng.randint(2, 9) + 20 * (name == 'below')}" for name in names]
        names = [rng.choice(kind) for kind in rng.sample(MAP_KINDS, maps)]
        steps += [f"{name}{rng.randint(2, 30)}" for name in names]
        operands = (*steps, *([rng.choice(tuple(REDUCTIONS))] if filters else []))
        if len({str(_run(operands, given)) for given in _inputs(operands)}) >= DIFFERENT:
            return operands


def prompt(operands: Operands) -> str:
    """The user's message, with the first test as an example."""
    given = _argument(operands)
    example = columns(operands)["tests"][0].removeprefix("assert ").replace(" == ", " returns ")
    return (
        f"Write a Python function `solve({given})` that returns {_words(operands)}. "
        f"For example, {example}. Answer with the function in one ```python block."
    )


def answer(operands: Operands) -> str:
    """A function that passes the tests."""
    lines = [f"def solve({_argument(operands)}):"]
    for step, k in map(_read, operands):
        code = step.code.format(k=k)
        if step in REDUCTIONS.values():
            lines.append(f"    return {code}")
        elif step in FILTERS.values():
            lines.append(f"    numbers = [x for x in numbers if {code}]")
        elif _scalar(operands):
            lines.append(f"    x = {code}")
        else:
            lines.append(f"    numbers = [{code} for x in numbers]")
    return "\n".join(lines + (["    return x"] if _scalar(operands) else []))


def columns(operands: Operands) -> dict[str, Any]:
    """Assertions that the function must pass, the same for the same operands."""
    return {
        "tests": [
            f"assert solve({given}) == {_run(operands, given)}" for given in _inputs(operands)
        ]
    }


def _inputs(operands: Operands) -> list[Any]:
    """The arguments that tests pass to the function; the first list is short, the last empty."""
    rng = Random(f"{NAME}/{'/'.join(operands)}")
    if _scalar(operands):
        return [rng.randint(-99, 99) for _ in range(TESTS)]
    sizes = (6, *(rng.randint(8, 16) for _ in range(TESTS - 2)), 0)
    return [[rng.randint(-30, 60) for _ in range(size)] for size in sizes]


def _run(operands: Operands, value: Any) -> Any:
    for step, k in map(_read, operands):
        if step in REDUCTIONS.values() or _scalar(operands):
            value = step.run(value, k)
        elif step in FILTERS.values():
            value = [x for x in value if step.run(x, k)]
        else:
            value = [step.run(x, k) for x in value]
    return value


def _words(operands: Operands) -> str:
    steps = [(step, step.words.format(k=k)) for step, k in map(_read, operands)]
    maps = " and then ".join(words for step, words in steps if step in MAPS.values())
    if _scalar(operands):
        return f"the whole number x {maps}"
    filters = " and ".join(words for step, words in steps if step in FILTERS.values())
    end = steps[-1][1]
    none = " (0 if there are none)" if end in ("the largest", "the smallest") else ""
    return f"{end} of those whole numbers in the list that are {filters}, each {maps}{none}"


def _argument(operands: Operands) -> str:
    return "x" if _scalar(operands) else "numbers"


def _scalar(operands: Operands) -> bool:
    return operands[-1] not in REDUCTIONS


def _read(operand: str) -> tuple[Step, int]:
    name = operand.rstrip(digits)
    return (MAPS | FILTERS | REDUCTIONS)[name], int(operand[len(name) :] or 0)
