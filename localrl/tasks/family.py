"""The interface of a problem family: a module that draws, words and solves problems.

A family module defines

    NAME, DIFFICULTIES               its name, and its levels, easiest first
    draw(rng, difficulty)            the operands of a problem: a tuple of plain texts
    prompt(operands)                 the question for the model
    answer(operands)                 the gold answer

and, if they differ from the defaults below,

    REWARD                           the reward for its answers; None if its environment gives it
    ENVIRONMENT                      `module:Class` of its environment
    SANDBOX = True                   scoring runs code that the model wrote
    columns(operands)                further columns for the reward
    held_out_as(operands)            the family and operands that the hold-out rule uses
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from localrl.tasks.base import RewardSpec

Operands = tuple[str, ...]

EXACT_ANSWER = RewardSpec("final_answer", "localrl.rewards.answers:final_answer")
ACCURACY = RewardSpec("accuracy", "localrl.rewards.accuracy:accuracy_reward")

REASON = "Think step by step, then end with a line"
"""Text that follows the question in families for instruction-tuned models."""


def reward_of(family: ModuleType) -> RewardSpec | None:
    """The reward for the family's answers; None if only its environment gives one."""
    return getattr(family, "REWARD", EXACT_ANSWER)


def environment_of(family: ModuleType) -> str | None:
    """`module:Class` of the family's environment; None if the model answers in one turn."""
    return getattr(family, "ENVIRONMENT", None)


def needs_sandbox(family: ModuleType) -> bool:
    """True if scoring an answer runs code that the model wrote."""
    return getattr(family, "SANDBOX", False)


def columns_of(family: ModuleType, operands: Operands) -> dict[str, Any]:
    """The columns that the family's reward needs besides the answer."""
    return family.columns(operands) if hasattr(family, "columns") else {}


def held_out_as(family: ModuleType, operands: Operands) -> tuple[str, Operands]:
    """The family and operands that decide if a problem is held out, regardless of its wording."""
    if hasattr(family, "held_out_as"):
        return family.held_out_as(operands)
    return family.NAME, operands
