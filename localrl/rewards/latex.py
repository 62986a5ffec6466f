"""Answers in any LaTeX, read by math-verify, an extra: `--reward math_verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def math_verify_reward(
    completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the answer equals the gold one, else 0.0; None where the gold one cannot be read.

    As TRL's accuracy_reward reads them, but answers count without a box too. pip install
    'localrl[math]'.
    """
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    rewards: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        wanted = parse(f"${gold}$") or parse(str(gold))
        rewards.append(float(verify(wanted, parse(text))) if wanted else None)
    return rewards
