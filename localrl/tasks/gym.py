"""Tasks of reasoning-gym, an extra: `--task gym:NAME`. Runs in the worker's child, as it is heavy.

    pip install 'localrl[gym]'
    localrl train --model DIR --task gym:chain_sum

Its puzzles are generated from a seed, so a row is identified by its number alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

SEED = 0
MOST = 1_000_000
"""Declared number of puzzles in a task; each is generated on demand."""


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """The first `count` puzzles of a task, as rows of data.

    Raises: ValueError if there is no such task.
    """
    puzzles = _puzzles(name)
    return [
        {
            "id": f"{name}/{index}",
            "question": puzzles[index]["question"],
            "answer": puzzles[index]["answer"],
            "gym": name,
            "index": index,
        }
        for index in range(count)
    ]


def gym_reward(
    completions: Sequence[Any], gym: Sequence[str], index: Sequence[int], **columns: Any
) -> list[float]:
    """Score each answer with reasoning-gym, 0 to 1.

    The answer is the text in <answer>...</answer>, or the whole completion without these tags.
    """
    scores = []
    for completion, name, number in zip(completions, gym, index, strict=True):
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        puzzles = _puzzles(name)
        scores.append(float(puzzles.score_answer(_stated(text), entry=puzzles[number])))
    return scores


def _stated(text: str) -> str:
    _, found, after = text.rpartition("<answer>")
    return after.partition("</answer>")[0].strip() if found else text.strip()


@functools.cache
def _puzzles(name: str) -> Any:
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    return reasoning_gym.create_dataset(name, size=MOST, seed=SEED)
