"""What a family of generated problems is: a module that draws, words and solves them.

A family module defines

    NAME, DIFFICULTIES               its name, and its levels, easiest first
    draw(rng, difficulty)            the operands of a problem: a tuple of plain texts
    prompt(operands)                 what the model is asked
    answer(operands)                 the gold answer

and, where it differs from the defaults below,

    REWARD                           what judges its answers; None: its environment alone does
    ENVIRONMENT                      `module:Class` of what the model talks to
    SANDBOX = True                   judging runs code that the model wrote
    columns(operands)                further columns for the reward
    held_out_as(operands)            the family and the operands that the hold-out rule looks at
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from localrl.tasks.base import RewardSpec

Operands = tuple[str, ...]

EXACT_ANSWER = RewardSpec("final_answer", "localrl.rewards.answers:final_answer")
ACCURACY = RewardSpec("accuracy", "localrl.rewards.accuracy:accuracy_reward")

REASON = "Think step by step, then end with a line"
"""How the question of a family for instruction-tuned models goes on."""


def reward_of(family: ModuleType) -> RewardSpec | None:
    """What judges the family's answers; None where its environment alone does."""
    return getattr(family, "REWARD", EXACT_ANSWER)


def environment_of(family: ModuleType) -> str | None:
    """`module:Class` of what the model talks to; None where it answers once."""
    return getattr(family, "ENVIRONMENT", None)


def needs_sandbox(family: ModuleType) -> bool:
    """Whether judging an answer runs code that the model wrote."""
    return getattr(family, "SANDBOX", False)


def columns_of(family: ModuleType, operands: Operands) -> dict[str, Any]:
    """The columns that the family's reward needs beside the answer."""
    return family.columns(operands) if hasattr(family, "columns") else {}


def held_out_as(family: ModuleType, operands: Operands) -> tuple[str, Operands]:
    """The family and the operands by which a problem is held out: its substance, not its looks."""
    if hasattr(family, "held_out_as"):
        return family.held_out_as(operands)
    return family.NAME, operands
