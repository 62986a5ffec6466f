"""From what a person writes after `--task` to a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from localrl.config import TaskConfig
from localrl.errors import ConfigError, DataError
from localrl.tasks.base import RewardSpec, Task
from localrl.tasks.builtin import load_task
from localrl.tasks.files import load_file_task, make_file_task
from localrl.worker import Worker

FUNCTION = "examples"
"""What a Python file of data defines: no arguments, returns rows as a JSONL file would hold."""


def open_task(config: TaskConfig, rewards: Sequence[RewardSpec], worker: Worker) -> Task:
    """The built-in task of that name, or the user's data: a JSONL file, a folder, a Python file.

    `rewards` take the place of the task's own; data need some. A Python file runs in the worker.

    Raises: ConfigError when there is no such task, or data without rewards; DataError for data
    that cannot be used.
    """
    path = Path(config.name).expanduser()
    if not is_data(config.name):
        task = load_task(config.name, train_prompts=config.train_prompts)
        return replace(task, rewards=tuple(rewards)) if rewards else task
    if not rewards:
        raise ConfigError(
            f"Nothing says how answers to {path} are scored. Name a reward, --reward accuracy or "
            "--reward my_rewards.py:function."
        )
    if path.suffix == ".py":
        rows = _rows(path, worker)
        return make_file_task(path, rewards, rows, config.train_prompts, config.system)
    return load_file_task(path, rewards, train_prompts=config.train_prompts, system=config.system)


def is_data(name: str) -> bool:
    """Whether a task is named by a path, not by a built-in name."""
    path = Path(name).expanduser()
    return path.suffix in (".jsonl", ".py", ".json") or "/" in name or path.is_dir()


def _rows(path: Path, worker: Worker) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the file's `examples()` returns, row by row with its place."""
    reply = worker.call(f"{path}:{FUNCTION}", {})
    if not reply.ok:
        raise DataError(
            f"{FUNCTION}() of {path} failed: {reply.message}.\n{reply.traceback or ''}".strip()
        )
    if not isinstance(reply.value, list):
        raise DataError(f"{FUNCTION}() of {path} must return a list of rows, one dictionary each.")
    for number, row in enumerate(reply.value, start=1):
        place = f"{path}, example {number}"
        if not isinstance(row, dict):
            raise DataError(f"{place} is {row!r:.60}; a row is a dictionary.")
        yield place, row
