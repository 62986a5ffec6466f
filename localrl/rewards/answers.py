"""Rewards that compare a final answer with the gold answer. Runs in a child: plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MARKER = "#"

Completion = str | Sequence[Mapping[str, Any]]
"""Plain text, or chat messages, the last of which is the model's."""


def final_answer(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1.0 if the text after the last `#` is exactly the gold answer, else 0.0; None without one.

    Only spaces at either end of the answer are ignored. Any of a list of gold answers is right.
    """
    return [
        _exactly(stated_answer(text_of(completion)), gold)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _exactly(found: str | None, gold: Any) -> float | None:
    golds = gold if isinstance(gold, (list, tuple)) else [gold]
    texts = [text for one in golds if one is not None and (text := str(one).strip())]
    return float(found in texts) if texts else None


def text_of(completion: Completion) -> str:
    """The model's text, from a string or from chat messages.

    For several messages it is the last one; empty if the model did not write that (a tool's
    result), or wrote only a tool call.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1]
    written = last.get("role", "assistant") == "assistant"
    return str(last.get("content") or "") if written else ""


def stated_answer(text: str) -> str | None:
    """The text after the last marker, or None if there is no marker."""
    _, marker, tail = text.rpartition(MARKER)
    return tail.strip() if marker else None
