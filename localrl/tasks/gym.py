"""Tasks of reasoning-gym, an extra: `--task gym:NAME`. Runs in the worker's child, as it is heavy.

    pip install 'localrl[gym]'
    localrl train --model DIR --task gym:chain_sum

Its puzzles are drawn from a seed, so that a row is named by its number alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

SEED = 0
MOST = 1_000_000
"""Puzzles that a task is said to have; each is made when it is asked for."""


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """The first `count` puzzles of a task, as rows of data.

    Raises: ValueError when there is no such task.
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
    """What reasoning-gym gives each answer, 0 to 1.

    Answers stand in <answer>...</answer>; without these, all that was written counts.
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
