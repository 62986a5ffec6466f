"""Rewards that compare a final answer with the gold one. Runs in a spawned child: plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MARKER = "#"

Completion = str | Sequence[Mapping[str, Any]]
"""Plain text, or chat messages of which the last is the model's."""


def final_answer(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[str],
    **columns: Any,
) -> list[float | None]:
    """1.0 where all that follows the last `#` is the gold answer, else 0.0.

    Spaces at either end of the answer are forgiven; nothing else is.
    """
    return [
        1.0 if stated_answer(text_of(completion)) == gold else 0.0
        for completion, gold in zip(completions, answer, strict=True)
    ]


def text_of(completion: Completion) -> str:
    """The model's text, whether it came as a string or as chat messages.

    Of several messages it is the last one; empty when the model did not write that, such as a
    tool's result, or wrote only a tool call.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1]
    written = last.get("role", "assistant") == "assistant"
    return str(last.get("content") or "") if written else ""


def stated_answer(text: str) -> str | None:
    """What follows the last marker, or None when there is no marker."""
    _, marker, tail = text.rpartition(MARKER)
    return tail.strip() if marker else None
