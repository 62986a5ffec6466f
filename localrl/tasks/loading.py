"""Opens the task named by `--task`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError, DataError
from localrl.processes.worker import Worker
from localrl.settings import TaskConfig
from localrl.tasks.base import RewardSpec
from localrl.tasks.builtin import BuiltinTask, list_tasks, load_task
from localrl.tasks.environments import Environments, open_environments
from localrl.tasks.files import HELD_OUT_OF, FileTask, HoldOut, load_file_task, make_file_task
from localrl.tasks.formats import check_table
from localrl.tasks.sources import find_source

GYM = "gym:"
GYM_PROMPTS = 1000
"""Default number of puzzles to train on."""

COMPLETION = "completion"
"""Column of worked examples with what is to be learned; a task's data have none."""
ROWS = "rows"
"""Name of tasks whose rows were handed over in Python."""
NO_TASK = "none"
"""Name of the task of a supervised run that samples nothing."""
FUNCTION = "examples"
"""Function that a Python data file defines: no arguments, returns rows as in a JSONL file."""


def open_task(
    config: TaskConfig,
    rewards: Sequence[RewardSpec],
    worker: Worker,
    *,
    whole: bool = False,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> BuiltinTask | FileTask:
    """Open a built-in task, or the user's data: a table, a folder, a data set, a Python file.

    `rewards` replace the task's own; data require some. A Python file runs in the worker. Data are
    all trained on if `task.eval_prompts` is 0. whole: True to hold all of them out. rows: take
    these instead of those that the settings name.

    Raises: ConfigError if there is no such task, or data have no rewards; DataError for data that
    cannot be used.
    """
    path, config = Path(config.name).expanduser(), _of_problems(config)
    if config.columns and not config.demonstrations and not is_data(config.name):
        raise ConfigError(
            f"task.columns names columns of data, but {config.name} is a built-in task. Remove it."
        )
    if config.name.startswith(GYM):
        return _gym_task(config, rewards, worker)
    hold_out: HoldOut = "all" if whole else "some" if config.held_out else "none"
    if rows is not None:
        return _rows_task(config, rewards, rows, hold_out)
    if config.name == NO_TASK and not path.exists():
        raise ConfigError(
            "This run has worked examples and no task, so there is nothing to sample or to "
            "measure. Name a task with --task."
        )
    if config.name == ROWS and not path.exists():
        raise ConfigError(
            "The problems of this task were rows handed to train() in Python: only a program that "
            "has them can go on, with train(config, data=rows, ...). Or name others with --task."
        )
    if not is_data(config.name):
        task = load_task(config.name, train_prompts=config.train_prompts)
        return replace(task, rewards=tuple(rewards)) if rewards else task
    script = path.suffix == ".py" and not path.is_dir()
    if not rewards and not config.environment and not config.agent:
        if not script:
            find_source(config.name)  # what is wrong with the data is told first
        raise ConfigError(
            f"No reward is set for {path}, so its answers cannot be scored. Name one with --reward "
            "accuracy or --reward my_rewards.py:function."
        )
    if script:
        return make_file_task(
            path.stem,
            str(path),
            rewards,
            python_rows(path, worker),
            config.train_prompts,
            system=config.system,
            columns=config.columns,
            hold_out=hold_out,
        )
    return load_file_task(
        config.name,
        rewards,
        train_prompts=config.train_prompts,
        system=config.system,
        columns=config.columns,
        hold_out=hold_out,
    )


def with_environments(
    config: TaskConfig, task: BuiltinTask | FileTask, worker: Worker, warn: Callable[[str], None]
) -> tuple[BuiltinTask | FileTask, Environments | None]:
    """Open the task's environments; returns them and the task with their own rewards appended.

    Raises: ConfigError if there is no such environment, or no reward at all; DataError if an
    environment cannot be used.
    """
    factory = config.environment or task.environment
    found = open_environments(
        factory, config.tools, worker, limit_s=config.tool_timeout_s, warn=warn
    )
    if found is None:
        return task, None
    rewards = (*task.rewards, *found.rewards)
    if not rewards:
        raise ConfigError(
            f"No reward is set for {task.name}: {factory} has no get_reward(). Add one, or name a "
            "reward with --reward."
        )
    return replace(task, rewards=rewards), found


def _of_problems(config: TaskConfig) -> TaskConfig:
    """Return the settings without the column that only the worked examples of a run have."""
    if not config.demonstrations:
        return config
    columns = [text for text in config.columns if text.partition("=")[0].strip() != COMPLETION]
    return replace(config, columns=tuple(columns))


def _rows_task(
    config: TaskConfig,
    rewards: Sequence[RewardSpec],
    rows: Sequence[Mapping[str, Any]],
    hold_out: HoldOut,
) -> FileTask:
    """Make a task from rows of this process."""
    if not rewards and not config.environment and not config.agent:
        raise ConfigError(
            "No reward is set, so the answers to these rows cannot be scored. Hand functions over, "
            "as in train(config, data=rows, rewards=[score]), or set task.rewards."
        )
    return make_file_task(
        ROWS,
        "data",
        rewards,
        ((f"data, row {number}", row) for number, row in enumerate(rows, start=1)),
        config.train_prompts,
        system=config.system,
        columns=config.columns,
        hold_out=hold_out,
    )


def _gym_task(config: TaskConfig, rewards: Sequence[RewardSpec], worker: Worker) -> FileTask:
    """Open a reasoning-gym task with the requested number of puzzles, holding some of them out."""
    name = config.name.removeprefix(GYM)
    count = (config.train_prompts or GYM_PROMPTS) * HELD_OUT_OF // (HELD_OUT_OF - 1)
    # Ask for a few more, since hashes decide which ones are held out.
    reply = worker.call("localrl.tasks.gym:rows", {"name": name, "count": count + count // 8 + 16})
    if not reply.ok:
        missing = "No module named 'reasoning_gym'" in reply.message
        todo = "pip install 'localrl[gym]'" if missing else "See reasoning-gym's list of datasets."
        raise ConfigError(f"The task {config.name} cannot be loaded: {reply.message}. {todo}")
    own = rewards or (RewardSpec("gym_reward", "localrl.tasks.gym:gym_reward"),)
    rows = ((f"{config.name}, puzzle {row['index']}", row) for row in reply.value)
    return make_file_task(config.name, name, own, rows, config.train_prompts, system=config.system)


def is_data(name: str) -> bool:
    """True if a task is the user's own data rather than a built-in or reasoning-gym task.

    Data are a path with a slash or an ending, a file or folder of this name, or user/name on the
    Hub. A built-in task comes before a file or folder that is called the same: write ./steps.
    """
    if name.startswith(GYM) or name.partition(":")[0] in list_tasks():
        return False
    return "/" in name or bool(Path(name).suffix) or Path(name).exists()


def python_rows(path: Path, worker: Worker) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows that the file's `examples()` returns, each with its place."""
    if not path.exists():
        check_table(path)
    reply = worker.call(f"{path}:{FUNCTION}", {})
    if not reply.ok and reply.failure == "raised" and reply.traceback is None:
        raise DataError(
            f"{path} is no task: {reply.message}. Define {FUNCTION}(), which returns a list of "
            "rows. A file of rewards is named with --reward FILE.py:FUNCTION."
        )
    if not reply.ok:
        raise DataError(
            f"{FUNCTION}() of {path} failed: {reply.message}.\n{reply.traceback or ''}".strip()
        )
    if not isinstance(reply.value, list):
        raise DataError(f"{FUNCTION}() of {path} must return a list of rows, each a dictionary.")
    for number, row in enumerate(reply.value, start=1):
        place = f"{path}, example {number}"
        if not isinstance(row, dict):
            raise DataError(f"{place} is {row!r:.60}; a row must be a dictionary.")
        yield place, row
