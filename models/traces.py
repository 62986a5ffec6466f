"""The texts the embedded model is trained on: a problem and one way of reasoning about it.

At every step the writer either *works* the step, written out so that a small model makes no
mistake, or *guesses* it: shorter, by a rule of thumb that is right about half of the time. Which of
the two is drawn anew at each step and says nothing about the problem. Every completion follows its
rule exactly: what a policy can improve is which rule it uses, not how well it follows one.

    sums     worked  740;+58=231;    47 + 85 = 132, lowest digit first
             guessed 740;?=221;      forgets the carry out of the lowest digits
    sorting  worked  kgbpa>a;        the smallest of all letters that remain
             guessed ?>b;            the smallest of the first half of them
"""

from __future__ import annotations

from random import Random

from localrl.tasks.builtin import FAMILIES, draw_problem

GUESS_RATE = 0.55
GUESS = "?"


def total_digits(total: int) -> str:
    """Three digits, lowest first."""
    return f"{total:03d}"[::-1]


def sums_trace(operands: tuple[str, ...], guess_rate: float, rng: Random) -> str:
    """Reason about a sum; each step adds one number to the running total."""
    total = int(operands[0])
    parts = [f"{total_digits(total)};"]
    for operand in operands[1:]:
        worked = total + int(operand)
        if rng.random() < guess_rate:
            carry = total % 10 + int(operand) % 10 >= 10
            total = worked - 10 if carry else worked
            parts.append(f"{GUESS}={total_digits(total)};")
        else:
            total = worked
            parts.append(f"+{operand[::-1]}={total_digits(total)};")
    return "".join(parts) + f"#{total}"


def sorting_trace(operands: tuple[str, ...], guess_rate: float, rng: Random) -> str:
    """Reason about sorting; each step takes one letter from those that remain."""
    remaining = list(operands)
    parts = ["".join(remaining) + ";"]
    chosen = []
    while len(remaining) > 1:
        if rng.random() < guess_rate:
            letter = min(remaining[: (len(remaining) + 1) // 2])
            parts.append(f"{GUESS}>{letter};")
        else:
            letter = min(remaining)
            parts.append("".join(remaining) + f">{letter};")
        remaining.remove(letter)
        chosen.append(letter)
    return "".join(parts) + "#" + "".join(chosen + remaining)


TRACES = {"sums": sums_trace, "sorting": sorting_trace}


def training_text(index: int, guess_rate: float = GUESS_RATE) -> tuple[str, str]:
    """Prompt and completion number `index` of the endless stream the base model is trained on.

    Each step is guessed with probability `guess_rate`.
    """
    family, _, operands = next(draw_problem(FAMILIES["steps"], "base", index))
    trace = TRACES[family.NAME](operands, guess_rate, Random(f"trace/{index}"))
    return family.prompt(operands), trace
