"""Multiple choice: a question from another family, with one right answer among near misses.

    prompt  Which answer is right? Calculate 3 + 4 * 5. A) 35 B) 23 C) 22 D) 33 ...
    answer  B

The operands are the family, the number of options, a seed for the options, and the operands of
the question. A question that its own family holds out is held out here too.
"""

from __future__ import annotations

from datetime import date, timedelta
from random import Random
from types import ModuleType

from localrl.tasks import arithmetic, dates, units
from localrl.tasks.base import RewardSpec
from localrl.tasks.family import REASON, Operands
from localrl.tasks.family import held_out_as as held_out_of

NAME = "choice"
DIFFICULTIES = (1, 2, 3)
REWARD = RewardSpec("choice", "localrl.rewards.accuracy:choice_reward")

OPTIONS = {1: 3, 2: 4, 3: 6}
"""Number of options by level; questions have the same level in their own family."""
LETTERS = "ABCDEF"
SOURCES: dict[str, ModuleType] = {family.NAME: family for family in (arithmetic, dates, units)}


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: family, number of options, their seed, question."""
    source = rng.choice(tuple(SOURCES))
    salt = str(rng.randrange(1_000_000))
    question = SOURCES[source].draw(rng, difficulty)
    return (source, str(OPTIONS[difficulty]), salt, *question)


def prompt(operands: Operands) -> str:
    """The user's message."""
    options, _ = _options(operands)
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))
    question = SOURCES[operands[0]].question(operands[3:])
    return (
        f"{question} Choose the right answer.\n{listed}\n"
        f'{REASON} "Answer: " followed by the letter.'
    )


def answer(operands: Operands) -> str:
    """The letter of the right option."""
    options, right = _options(operands)
    return LETTERS[options.index(right)]


def held_out_as(operands: Operands) -> tuple[str, Operands]:
    """The hold-out key of the question in its own family, whatever the options."""
    return held_out_of(SOURCES[operands[0]], operands[3:])


def _options(operands: Operands) -> tuple[list[str], str]:
    """All options, in the order of their letters, and the right one."""
    source, count, salt, *question = operands
    right = SOURCES[source].answer(tuple(question))
    rng = Random(f"{NAME}/{salt}/{right}")
    options = [right]
    while len(options) < int(count):
        near = _near(rng, right)
        if near not in options:
            options.append(near)
    rng.shuffle(options)
    return options, right


def _near(rng: Random, right: str) -> str:
    """Draw an option of the same form as the right answer; it may equal an earlier one."""
    if right in dates.WEEKDAYS:
        return rng.choice(dates.WEEKDAYS)
    if right[4:5] == "-":
        return str(date.fromisoformat(right) + timedelta(days=rng.choice((-10, -2, -1, 1, 2, 10))))
    if "." in right:
        whole, _, digits = right.partition(".")
        return f"{int(whole) + rng.randint(-3, 3)}.{rng.choice((digits, digits[::-1]))}"
    distance = rng.choice((1, 2, 10, 20, 100))
    lower = int(right) - distance
    return str(lower if rng.random() < 0.5 and lower * int(right) > 0 else int(right) + distance)
