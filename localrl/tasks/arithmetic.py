"""Expressions with + - * and brackets, in symbols or in words.

    prompt  Calculate (3 + 4) * 5. Think step by step, ...
    answer  35

The operands are the style and the expression in postfix order: symbols 3 4 plus 5 times.
"""

from __future__ import annotations

from random import Random

from localrl.tasks.family import ACCURACY, REASON, Operands

NAME = "arithmetic"
DIFFICULTIES = (1, 2, 3, 4, 5)
REWARD = ACCURACY

SHAPES = {1: (1, 30), 2: (2, 20), 3: (3, 30), 4: (4, 50), 5: (6, 99)}
"""Number of operators, and the largest number in the expression, by level."""
LARGEST = 9999
"""Largest absolute value of any intermediate result."""

SYMBOLS = {"plus": "+", "minus": "-", "times": "*"}
BINDING = {"plus": 1, "minus": 1, "times": 2, "": 3}


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: style, then an expression in postfix order."""
    operators, top = SHAPES[difficulty]
    style = rng.choice(("symbols", "words"))
    while True:
        tokens = _expression(rng, operators, top)
        if max(map(abs, _values(tokens))) <= LARGEST:
            return (style, *tokens)


def question(operands: Operands) -> str:
    """The question, without instructions on how to answer."""
    style, *tokens = operands
    return f"Calculate {_written(tokens, style)}."


def prompt(operands: Operands) -> str:
    """The user's message."""
    return f'{question(operands)} {REASON} "Answer: " followed by the number.'


def answer(operands: Operands) -> str:
    """The value of the expression."""
    return str(_values(operands[1:])[-1])


def held_out_as(operands: Operands) -> tuple[str, Operands]:
    """The hold-out key: an expression in words and the same in symbols are one problem."""
    return NAME, operands[1:]


def _expression(rng: Random, operators: int, top: int) -> list[str]:
    if operators == 0:
        return [str(rng.randint(2, top))]
    before = rng.randint(0, operators - 1)
    left = _expression(rng, before, top)
    right = _expression(rng, operators - 1 - before, top)
    return [*left, *right, rng.choice(tuple(SYMBOLS))]


def _values(tokens: list[str] | Operands) -> list[int]:
    """Every intermediate value, the result last."""
    stack: list[int] = []
    values: list[int] = []
    for token in tokens:
        if token in SYMBOLS:
            right, left = stack.pop(), stack.pop()
            value = left + right if token == "plus" else left - right
            stack.append(left * right if token == "times" else value)
        else:
            stack.append(int(token))
        values.append(stack[-1])
    return values


def _written(tokens: list[str], style: str) -> str:
    """The expression in infix notation, with only the brackets it needs."""
    stack: list[tuple[str, int]] = []
    for token in tokens:
        if token not in SYMBOLS:
            stack.append((token, BINDING[""]))
            continue
        (right, right_binding), (left, left_binding) = stack.pop(), stack.pop()
        binding = BINDING[token]
        left = f"({left})" if left_binding < binding else left
        right = f"({right})" if right_binding <= binding else right
        sign = SYMBOLS[token] if style == "symbols" else token
        stack.append((f"{left} {sign} {right}", binding))
    return stack[0][0]
