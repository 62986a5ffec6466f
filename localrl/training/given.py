"""Python objects that were handed to `train`: rows of data and reward functions.

A configuration names what it needs, so that it can be written down and read back by another
process. What has no name is kept beside it, and the configuration says only that it was there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.config import RunConfig, demonstration
from localrl.errors import ConfigError, DataError
from localrl.processes.worker_child import plain
from localrl.rewards.in_process import PREFIX
from localrl.tasks.loading import ROWS

Reward = str | Callable[..., Any]
"""A reward function, or the text that names one."""


@dataclass(frozen=True, eq=False)
class Given:
    """Rows and reward functions that were handed over."""

    rows: Sequence[Mapping[str, Any]] | None = None
    """Rows as a file would hold them; None if the configuration names the task."""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Reward functions by target."""


NOTHING = Given()


def hand_over(
    config: RunConfig,
    data: Iterable[Mapping[str, Any]] | None,
    rewards: Reward | Sequence[Reward] | None,
) -> tuple[RunConfig, Given]:
    """Return the configuration with the names of what is handed over, and that itself.

    Raises: ConfigError for objects of another kind, or if the configuration names a task or rewards
    too; DataError for a row that JSON cannot hold.
    """
    functions: dict[str, Callable[..., Any]] = {}
    if rewards is not None:
        each = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
        texts = tuple(_text(reward, functions) for reward in each)
        config = _name(config, "task.rewards", texts, "rewards=")
    if data is None:
        return config, Given(None, functions)
    config = _name(config, "task.name", ROWS, "data=")
    demo = demonstration()["task.train_prompts"]
    if config.model.path is None and config.task.train_prompts == demo:
        config = config.replace("task.train_prompts", 0)  # the number of its own prompts
    return config, Given(_rows(data), functions)


def _name(config: RunConfig, key: str, value: Any, argument: str) -> RunConfig:
    was = config.value(key)
    if was not in (RunConfig().value(key), value):
        raise ConfigError(
            f"{key} is {was!r}, and {argument} is handed to train() as well. Keep one of them."
        )
    return config.replace(key, value)


def _text(reward: Any, functions: dict[str, Callable[..., Any]]) -> str:
    """Return the text that names a reward; a function is added to the others under its target."""
    if isinstance(reward, str):
        return reward
    if not callable(reward) or isinstance(reward, type):
        raise ConfigError(
            f"rewards holds {reward!r:.80}; each must be a function, an object that can be called, "
            "or a text that names a function."
        )
    inner = getattr(reward, "func", reward)  # of a functools.partial
    path = getattr(inner, "__qualname__", type(inner).__qualname__)
    module = str(getattr(inner, "__module__", ""))
    if inner is reward and module.startswith("localrl.") and path.isidentifier():
        return f"{module}:{path}"  # one of localrl's own
    name = re.sub(r"\W", "", path.rpartition(".")[2])
    target, number = f"{PREFIX}{name}", 1
    while target in functions:
        number += 1
        target = f"{PREFIX}{name}_{number}"
    functions[target] = reward
    return target


def _rows(data: Any) -> list[dict[str, Any]]:
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise ConfigError(
            f"data is {data!r:.60}; it must be a list of dictionaries, one for each problem. A "
            "file is named by the setting task.name."
        )
    return [_row(number, row) for number, row in enumerate(data, start=1)]


def _row(number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(
            f"Row {number} of data is {row!r:.60}; each must be a dictionary. Of a table of "
            "pandas, hand over table.to_dict('records')."
        )
    found = {}
    for column, value in row.items():
        try:
            found[str(column)] = json.loads(json.dumps(value, default=plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"Row {number} of data: the column {column!r} cannot be kept: {error}. Use text, "
                "numbers, lists and dictionaries with text keys."
            ) from None
    return found
