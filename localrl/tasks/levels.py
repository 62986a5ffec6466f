"""Parses the levels in a task's name: countdown:3, countdown:2-4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches

from localrl.errors import ConfigError


def parse_name(
    name: str, known: Mapping[str, tuple[int, ...]]
) -> tuple[str, tuple[int, ...] | None]:
    """Split a name into the task and its levels; None for all levels.

    known: the levels of each task.

    Raises: ConfigError for an unknown task or level.
    """
    task, colon, levels = name.partition(":")
    if task not in known:
        close = get_close_matches(task, known, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(
            f"Unknown task {name!r}{meant} Built-in tasks: {', '.join(known)}. Your own data are a "
            "file (data.jsonl, data.csv, data.parquet), a folder, or user/name on the Hub."
        )
    return task, _parse(name, levels, known[task]) if colon else None


def span(levels: tuple[int, ...]) -> str:
    """Format consecutive levels as text."""
    return f"level {levels[0]}" if len(levels) == 1 else f"levels {levels[0]} to {levels[-1]}"


def _parse(name: str, levels: str, known: tuple[int, ...]) -> tuple[int, ...]:
    match = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", levels)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last or first not in known or last not in known:
        task = name.partition(":")[0]
        raise ConfigError(
            f"Task {name!r} asks for levels {levels!r}; {task} has {span(known)}. "
            f"Write {task}, {task}:{known[0]} or {task}:{known[0]}-{known[-1]}."
        )
    return tuple(level for level in known if first <= level <= last)
