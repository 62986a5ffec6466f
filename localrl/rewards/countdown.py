"""Reward for countdown: checks that an expression makes the target. Runs in a child process."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.bases import conclusion

LONGEST = 200
"""Maximum characters in an expression; a longer one is wrong."""

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}
_SIGNS = {
    "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-",
    "\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "",
}  # fmt: skip
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")


def countdown_reward(
    completions: Sequence[Completion],
    target: Sequence[int],
    numbers: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float]:
    """1.0 if the conclusion is an expression that makes the target, else 0.0.

    It may use + - * / and brackets, and each of the numbers at most once. `= target` may follow.
    """
    return [
        float(_reaches(conclusion(text_of(completion)), goal, given))
        for completion, goal, given in zip(completions, target, numbers, strict=True)
    ]


def value_of(text: str, numbers: Sequence[int]) -> Fraction | None:
    """The exact value of an expression; None if it breaks a rule or has no value."""
    if len(text) > LONGEST or not _EXPRESSION.fullmatch(text):
        return None
    try:
        left = Counter(numbers)
        value = _value(ast.parse(text.strip(), mode="eval").body, left)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value if min(left.values()) >= 0 else None


def _reaches(text: str, target: int, numbers: Sequence[int]) -> bool:
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    text, equals, claim = text.partition("=")
    if equals and claim.strip() != str(target):
        return False
    return value_of(text, numbers) == target


def _value(node: ast.expr, left: Counter[int]) -> Fraction:
    """The value of a node; removes the numbers it uses from `left`."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        operation = _OPERATIONS[type(node.op)]
        return operation(_value(node.left, left), _value(node.right, left))
    if isinstance(node, ast.Constant) and type(node.value) is int and left[node.value] > 0:
        left[node.value] -= 1
        return Fraction(node.value)
    raise ValueError("not an expression of the numbers that are left")
