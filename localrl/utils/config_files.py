"""Finds files named in a configuration: in the working directory, or else next to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = (
    "model.path",
    "lora.adapter",
    "task.name",
    "task.demonstrations",
    "task.judge_prompt",
)
"""Settings that are a file or folder, or a name or a text; a text has a brace."""
FUNCTIONS = ("task.rewards", "task.decided", "task.environment", "task.tools", "task.agent")
"""Settings that name something in a file, as file.py:name; one or several."""


def found_beside(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings, with the folder prepended to each file that exists only there.

    The working directory comes first, so an example's configuration works from its own folder and
    from any other.
    """
    found = dict(settings)
    for key in (*FILES, *FUNCTIONS):
        value = found.get(key)
        if isinstance(value, str):
            found[key] = _found(value, folder)
        elif isinstance(value, list | tuple):
            found[key] = [_found(v, folder) if isinstance(v, str) else v for v in value]
    return found


def _found(value: str, folder: Path) -> str:
    file = value.partition(":")[0]
    if not file or "{" in value or Path(file).exists() or not (folder / file).exists():
        return value
    return str(folder / file) + value[len(file) :]
