"""Compares answers in any LaTeX with math-verify, an extra: `--reward math_verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import boxed_answer, without_thought
from localrl.rewards.golds import accepted


def math_verify_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 if the answer equals the gold answer, else 0.0; None if the gold answer is unreadable.

    The gold answer is chosen as by `accuracy`. An answer is the last \\boxed{} after the last
    </think>, or what math-verify finds in the text after it. Requires pip install 'localrl[math]'.
    """
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    def read(gold: Any) -> Any:
        return None if gold is None else parse(f"${gold}$") or parse(str(gold)) or None

    golds = accepted(answer, solution, len(completions), read)
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, golds, strict=True):
        text = without_thought(text_of(completion))
        boxed = boxed_answer(text)
        found = parse(text if boxed is None else f"\\boxed{{{boxed}}}") if wanted else []
        right = any(verify(one, found) for one in wanted)
        rewards.append(float(right) if wanted else None)
    return rewards
