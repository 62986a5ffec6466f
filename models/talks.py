"""The conversations the model that talks in turns is trained on: games and products.

    guessing    *heeds* the answers: writes down which numbers they leave, and one of these; or is
                *blind*: any number of the range, whatever was answered
    calculator  calls the tool and repeats what it returns, or writes some number of the right
                length at once

Which of the two is drawn for a conversation and says nothing about the problem: what a policy can
improve is which it does, not how well.

    heeding     37 to 51: 44 > lower > 37 to 43: 41 > higher > 42 to 43: 42
    blind       44 > lower > 47 > lower > 39 > higher > 42
"""

from __future__ import annotations

from random import Random

from localrl.tasks.builtin import FAMILIES, draw_problem
from localrl.tasks.calculator_tool import Calculator
from localrl.tasks.guessing import Guess

HEED_RATE = 0.2
CALL_RATE = 0.25
"""Shares of the conversations that do what wins."""
TURNS = 6
"""Guesses in a training text at the most; more than a game should take."""

USER, TOOL, ASSISTANT, END = "<|user|>", "<|tool|>", "<|assistant|>", "<|end|>"
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "'
CALL_END = '"}}</tool_call>'

Talk = list[tuple[str, bool]]
"""A conversation in pieces, and whether the model learns to write each."""


def game(operands: tuple[str, ...], heed_rate: float, rng: Random) -> Talk:
    """Guess until the number is found, or for `TURNS` guesses."""
    lowest, highest, number = map(int, operands)
    environment = Guess()
    environment.reset(answer=str(number), low=lowest, high=highest)
    heard: str | None = FAMILIES["guessing"][0].prompt(operands)
    low, high = lowest, highest
    heeds = rng.random() < heed_rate
    talk: Talk = []
    while heard is not None and len(talk) < 2 * TURNS:
        guess = rng.randint(low, high) if heeds else rng.randint(lowest, highest)
        text = f"{low} to {high}: {guess}" if heeds else str(guess)
        talk += [(USER + heard + ASSISTANT, False), (text + END, True)]
        low, high = (max(low, guess + 1), high) if guess < number else (low, min(high, guess - 1))
        heard = environment.step(str(guess))
    return talk


def product(operands: tuple[str, ...], call_rate: float, rng: Random) -> Talk:
    """Say what the product is, with the calculator or without."""
    question = (USER + FAMILIES["calculator"][0].prompt(operands) + ASSISTANT, False)
    expression = "*".join(operands)
    value = Calculator().calculate(expression)
    if rng.random() < call_rate:
        call = (CALL + expression + CALL_END + END, True)
        return [question, call, (TOOL + value + ASSISTANT, False), (value + END, True)]
    some = rng.randint(10 ** (len(value) - 1), 10 ** len(value) - 1)
    return [question, (str(some) + END, True)]


def training_talk(index: int, heed_rate: float = HEED_RATE, call_rate: float = CALL_RATE) -> Talk:
    """Conversation number `index` of the endless stream that the model is trained on."""
    task = ("guessing", "calculator")[index % 2]
    _, _, operands = next(draw_problem(FAMILIES[task], "base", index // 2))
    rng = Random(f"talk/{index}")
    if task == "guessing":
        return game(operands, heed_rate, rng)
    return product(operands, call_rate, rng)
