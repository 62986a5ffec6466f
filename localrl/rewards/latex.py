"""Compares answers in any LaTeX with math-verify, an extra: `--reward math_verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def math_verify_reward(
    completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 if the answer equals the gold answer, else 0.0; None if the gold answer is unreadable.

    Answers are parsed as by TRL's accuracy_reward, but need no box. Requires
    pip install 'localrl[math]'.
    """
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    rewards: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        wanted = parse(f"${gold}$") or parse(str(gold))
        rewards.append(float(verify(wanted, parse(text))) if wanted else None)
    return rewards
