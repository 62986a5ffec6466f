"""The rewards of all runners as localrl's child process calls it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import even, varied


def even_reward(completions: list, **columns: object) -> list[float]:
    """Share of even words."""
    return [even(text if isinstance(text, str) else text[0]["content"]) for text in completions]


def varied_reward(completions: list, **columns: object) -> list[float]:
    """Of any text."""
    return [varied(text if isinstance(text, str) else text[0]["content"]) for text in completions]
