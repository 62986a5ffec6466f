"""Converts rows of the user's data, JSON lines, to examples.

A row needs a prompt: `prompt` (text, or chat messages), `messages`, or `question`. It may have an
answer (`answer`, `ground_truth` or `solution`), an `id` and a `system` message. Every column is
passed to the reward functions under its own name.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from localrl.errors import DataError
from localrl.records import Example

PROMPTS = ("prompt", "messages", "question")
ANSWERS = ("answer", "ground_truth", "solution")
ROLES = ("system", "user", "assistant", "tool")
GSM8K = "####"
"""Marker in GSM8K data: the gold answer follows the last one."""


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every row of a JSONL file with its place, `file, line n`.

    The file is UTF-8, with or without a byte order mark; blank lines are skipped.

    Raises: DataError, naming file and line, if something cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    # Not splitlines(), which would also split at separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _row(f"{path}, line {number}", line)


def read_examples(rows: Iterator[tuple[str, dict[str, Any]]], system: str | None) -> list[Example]:
    """Convert rows to examples; `system` is the system message of rows without their own.

    A row without an `id` is named by a hash of its prompt and answer, so its name survives
    reordering; among equal rows the second gets the suffix `-2`, and so on.

    Raises: DataError, naming the place, for a row without a usable prompt, or a repeated `id`.
    """
    examples: list[Example] = []
    places: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for place, row in rows:
        example = to_example(place, row, system)
        if "id" not in row:
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
    own = row.get("system", system)
    if own is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": _text(place, "system", own)}, *messages)
    answer = _answer(row)
    columns = {name: value for name, value in row.items() if name not in (*PROMPTS, "id", "system")}
    name = _text(place, "id", str(row["id"])) if "id" in row else prompt_hash(messages, answer)[:12]
    as_text = not any(isinstance(row.get(column), list) for column in PROMPTS)
    return Example(id=name, messages=messages, answer=answer, columns=columns, as_text=as_text)


def prompt_hash(messages: Sequence[Mapping[str, str]], answer: Any = None) -> str:
    """SHA-256 in hexadecimal of the messages, and of the answer if there is one."""
    parts = [list(map(dict, messages)), *([] if answer is None else [answer])]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}.") from None
    except RecursionError:
        raise DataError(f"{place} is nested too deeply to read.") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} is {line.strip()[:60]!r}; a row must be a JSON object {{...}}.")
    return row


def _messages(place: str, row: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    present = [name for name in PROMPTS if row.get(name) is not None]
    if not present:
        found = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{place} has no prompt, messages or question; its columns are {found}.")
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
    answer = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    if isinstance(answer, str) and GSM8K in answer:
        return answer.rpartition(GSM8K)[2].strip()
    return answer
