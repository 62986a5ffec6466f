"""Rows with worked examples: a prompt, and the completion that a model is to learn.

A row has `messages` that hold the model's turns too, or a prompt as any task's row and a
`completion`: text, or chat messages that begin and end with the model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from localrl.errors import DataError
from localrl.processes.worker import Worker
from localrl.records import Example
from localrl.settings import TaskConfig
from localrl.tasks.files import FileTask, HoldOut, load_file_task, make_file_task
from localrl.tasks.loading import COMPLETION, python_rows
from localrl.tasks.messages import read_message, read_text
from localrl.tasks.rows import is_empty, to_example

MESSAGES = "messages"


def load_demonstrations(config: TaskConfig, worker: Worker) -> FileTask:
    """Load the worked examples that `task.demonstrations` names, as any task's data are read.

    The column `completion` of each example holds the messages after its prompt. Rows are held out
    as a task's are, see `load_file_task`; none if `task.eval_prompts` is 0.

    Raises: ConfigError if there is no such source; DataError, naming file and line, for a row
    without a turn of the assistant, or that cannot be read.
    """
    name = config.demonstrations or ""
    hold_out: HoldOut = "some" if config.held_out else "none"
    path = Path(name).expanduser()
    settings: dict[str, Any] = {
        "system": config.system,
        "columns": config.columns,
        "hold_out": hold_out,
        "read": to_demonstration,
    }
    if path.suffix == ".py" and not path.is_dir():
        return make_file_task(path.stem, name, (), python_rows(path, worker), 0, **settings)
    return load_file_task(name, (), **settings)


def completion_of(example: Example) -> Sequence[Mapping[str, Any]]:
    """Return the messages after the prompt of a worked example."""
    return example.columns[COMPLETION]


def to_demonstration(place: str, row: Mapping[str, Any], system: str | None) -> Example:
    """Convert one row to an example whose column `completion` holds the messages after its prompt.

    Raises: DataError, naming the place.
    """
    if not is_empty(row.get(COMPLETION)):
        messages = _completion(place, row[COMPLETION])
        prompt = {name: value for name, value in row.items() if name != COMPLETION}
    else:
        head, messages = _split(place, row)
        prompt = {**row, MESSAGES: head}
        prompt = {name: value for name, value in prompt.items() if name != "prompt"}
    _check_turns(place, messages)
    for message in messages:
        _check_calls(place, message.get("tool_calls") or [])
    example = to_example(place, prompt, system)
    if example.begun:
        raise DataError(
            f"{place}: the prompt ends in a message of the assistant. Move it to the completion."
        )
    return replace(example, columns={**example.columns, COMPLETION: messages})


def _completion(place: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": read_text(place, COMPLETION, value)},)
    if not isinstance(value, list):
        raise DataError(
            f"{place}: completion is {value!r:.60}; it must be text or a list of chat messages."
        )
    return tuple(read_message(place, COMPLETION, message) for message in value)


def _split(place: str, row: Mapping[str, Any]) -> tuple[list[Any], tuple[Mapping[str, Any], ...]]:
    """Split a row's messages before the assistant's first turn."""
    value = row.get(MESSAGES)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):  # told below
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        found = ", ".join(f"{name!r:.60}" for name in row) or "none"
        raise DataError(
            f"{place} has neither `messages` with the assistant's turns nor a `completion`; its "
            f"columns are {found}. Name the column of the right answers with --columns "
            "completion=COLUMN"
        )
    messages = [read_message(place, MESSAGES, message) for message in value]
    roles = [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    if not any(role in ("user", "tool") for role in roles[:first]):
        raise DataError(
            f"{place}: no message of the user comes before the assistant's. Add what it answers."
        )
    return list(value[:first]), tuple(messages[first:])


def _check_turns(place: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that messages begin and end with the assistant's, and that replies are between."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(
            f"{place} has no message of the assistant: there is nothing to learn from it. Add the "
            "right answer, or remove the row."
        )
    if roles[0] != "assistant" or roles[-1] != "assistant":
        odd = roles[0] if roles[0] != "assistant" else roles[-1]
        raise DataError(
            f"{place}: what is to be learned must begin and end with the assistant's, and a "
            f"message of the {odd} stands there. Remove that message."
        )
    if any(one == other == "assistant" for one, other in pairwise(roles)):
        raise DataError(
            f"{place}: two messages of the assistant follow each other. Join them to one."
        )


def _check_calls(place: str, calls: Any) -> None:
    """Check that tool calls have names, and arguments that are an object or the JSON of one.

    Raises: DataError.
    """
    if not isinstance(calls, list):
        raise DataError(f"{place}: tool_calls is {calls!r:.60}; it must be a list of tool calls.")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{place}: tool_calls holds {call!r:.80}; a call needs a `function` with a `name` "
                "and `arguments`."
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # told below
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise DataError(
                f"{place}: the arguments of the call of {function['name']!r} are "
                f"{function['arguments']!r:.60}; they must be an object, or the JSON of one."
            )
