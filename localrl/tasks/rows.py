"""Converts rows of the user's data to examples.

A row needs a prompt: `prompt` (text, or chat messages), `messages`, or `question`. It may have an
answer (`answer`, `ground_truth` or `solution`), an `id` and a `system` message. Every column is
passed to the reward functions under its own name. `task.columns` names other columns for these.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from localrl.config import closest
from localrl.errors import ConfigError, DataError
from localrl.records import Example

PROMPTS = ("prompt", "messages", "question")
ANSWERS = ("answer", "ground_truth", "solution")
ROLES = ("system", "user", "assistant", "tool")
GSM8K = "####"
"""Marker in GSM8K data: the gold answer follows the last one."""


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """Read `prompt=question` as the column to take for each name; `image=` takes none.

    Raises: ConfigError if a text has another form, or a name occurs twice.
    """
    columns: dict[str, str] = {}
    for text in texts:
        name, equals, column = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise ConfigError(
                f"task.columns has {text!r}. Write NAME=COLUMN, as in prompt=question."
            )
        if name in columns:
            raise ConfigError(f"task.columns names {name!r} twice. Keep one of them.")
        columns[name] = column
    return columns


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with some columns under other names too.

    Naming a prompt leaves out other prompts that the row has, and naming an answer other answers.
    """
    groups = [group for group in (PROMPTS, ANSWERS) if set(group) & columns.keys()]
    hidden = {*columns, *(name for group in groups for name in group)}
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {name: row[column] for name, column in columns.items() if column in row}


def read_examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Convert rows to examples; `system` is the system message of rows without their own.

    columns: columns to take under other names, see `parse_columns`.

    A row without an `id` is named by a hash of its prompt and answer, so its name survives
    reordering; among equal rows the second gets the suffix `-2`, and so on.

    Raises: DataError, naming the place, for a row without a usable prompt, or a repeated `id`;
    ConfigError if no row has a column that is to be taken.
    """
    if columns:
        rows = list(rows)
        _check_columns(rows, columns)
        rows = [(place, rename(row, columns)) for place, row in rows]
    examples: list[Example] = []
    places: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for place, row in rows:
        example = to_example(place, row, system)
        if row.get("id") is None:
            seen[example.id] += 1
            if seen[example.id] > 1:
                name = f"{example.id}-{seen[example.id]}"
                example = replace(example, id=name, tracker_key=name)
        if example.id in places:
            raise DataError(
                f"{place}: the id {example.id!r} is already used in {places[example.id]}. Make "
                "ids unique, or leave them out."
            )
        places[example.id] = place
        examples.append(example)
    return examples


def to_example(place: str, row: Mapping[str, Any], system: str | None) -> Example:
    """Convert one row to an example. Raises: DataError, see `read_examples`."""
    messages = _messages(place, row)
    own = system if row.get("system") is None else row["system"]
    if own is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": _text(place, "system", own)}, *messages)
    answer = _answer(row)
    columns = {name: value for name, value in row.items() if name not in (*PROMPTS, "id", "system")}
    given = row.get("id")
    name = prompt_hash(messages, answer)[:12] if given is None else _text(place, "id", str(given))
    as_text = not any(isinstance(row.get(column), list) for column in PROMPTS)
    return Example(id=name, messages=messages, answer=answer, columns=columns, as_text=as_text)


def prompt_hash(messages: Sequence[Mapping[str, str]], answer: Any = None) -> str:
    """SHA-256 in hexadecimal of the messages, and of the answer if there is one."""
    parts = [list(map(dict, messages)), *([] if answer is None else [answer])]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _check_columns(
    rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Mapping[str, str]
) -> None:
    there = dict.fromkeys(name for _, row in rows for name in row)
    for name, column in columns.items():
        if rows and column and column not in there:
            raise ConfigError(
                f"task.columns takes {name!r} from the column {column!r}, which the data lack."
                f"{closest(column, there)} They have {', '.join(there)}."
            )


def _messages(place: str, row: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    present = [name for name in PROMPTS if row.get(name) is not None]
    empty = [name for name in PROMPTS if name in row]
    if not present and empty:
        raise DataError(f"{place}: {empty[0]} is empty. Fill it in, or remove the row.")
    if not present:
        found = ", ".join(f"{name!r:.60}" for name in row) or "none"
        raise DataError(
            f"{place} has no prompt, messages or question; its columns are {found}. If one of them "
            "is the prompt, name it with --columns prompt=COLUMN."
        )
    value = row[present[0]]
    if isinstance(value, str):
        return ({"role": "user", "content": _text(place, present[0], value)},)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{place}: {present[0]} is {value!r:.60}; it must be text or a list of chat messages."
        )
    messages = tuple(_message(place, present[0], message) for message in value)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the last message is the assistant's. End with the user's, and put the right "
            "answer in `answer`."
        )
    return messages


def _message(place: str, column: str, message: Any) -> Mapping[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(
            f"{place}: {column} holds {message!r:.60}; a message needs a `role` and a `content`."
        )
    if message["role"] not in ROLES:
        raise DataError(f"{place}: the role {message['role']!r} is not one of {', '.join(ROLES)}.")
    return {"role": message["role"], "content": _text(place, "content", message["content"])}


def _text(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {column} is {value!r:.60}; it must be text.")
    return value


def _answer(row: Mapping[str, Any]) -> Any:
    """The gold answer, None if the row has none; in GSM8K's format the part after `####`."""
    answer = next((row[name] for name in ANSWERS if row.get(name) not in (None, "", [])), None)
    if isinstance(answer, str) and GSM8K in answer:
        return answer.rpartition(GSM8K)[2].strip()
    return answer
