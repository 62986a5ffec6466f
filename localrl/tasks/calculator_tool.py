"""The calculator that `calculator` offers. Runs in a spawned child: plain Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

LONGEST = 200
"""Maximum characters in an expression."""
LARGEST = 10**50
"""Largest numerator or denominator of any intermediate value."""

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Calculator:
    """An environment that offers one tool."""

    def reset(self, **row: Any) -> None:
        """Do nothing: no state is kept between problems."""

    def calculate(self, expression: str) -> str:
        """Calculate the value of an arithmetic expression.

        Args:
            expression: Numbers, + - * / and brackets, such as (3 + 4) * 5.

        Returns:
            The value.
        """
        return _written(value_of(expression))


def value_of(expression: str) -> Fraction:
    """The exact value of an expression.

    Raises: ValueError, with a reason for whoever wrote it, if it is invalid or too large.
    """
    if not isinstance(expression, str) or len(expression) > LONGEST:
        raise ValueError(f"the expression must be a text of at most {LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is not an expression") from None
    try:
        return _value(tree.body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def _value(node: ast.expr) -> Fraction:
    """The value of a node; its depth is bounded by the expression's length."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(_number(node.value))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        operation = _OPERATIONS[type(node.op)]
        return _bounded(operation(_value(node.left), _value(node.right)))
    raise ValueError("only numbers, + - * / and brackets can be calculated")


def _number(value: Any) -> Fraction:
    """Convert a number as it is written: 0.1 is exactly one tenth."""
    if value == float("inf"):
        raise ValueError("a number is too large")
    return Fraction(repr(value))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("a number is too large")
    return value


def _written(value: Fraction) -> str:
    """Format whole numbers exactly, others to about 15 digits."""
    return str(value.numerator) if value.denominator == 1 else repr(float(value))
