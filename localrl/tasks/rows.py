"""Converts rows of the user's data to examples.

A row needs a prompt: `prompt` (text, or chat messages), `messages`, `question`, `problem` or
`instruction`. It may have an answer (`answer`, `ground_truth` or `solution`), an `id`, a `system`
message and `tools`. Every column is passed to the reward functions under its own name.
`task.columns` names other columns for these.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from localrl.config import closest
from localrl.errors import ConfigError, DataError
from localrl.records import Example
from localrl.tasks.messages import read_conversation, read_text

PROMPTS = ("prompt", "messages", "question", "problem", "instruction")
HIDDEN = ("prompt", "messages", "question", "id", "system")
"""Columns that reward functions do not get under their own names."""
ANSWERS = ("answer", "ground_truth", "solution")
INPUT = "input"
"""Column with the text that belongs to an `instruction`."""
LISTED = 5
"""Maximum number of bad rows whose places an error lists besides the first."""
GSM8K = "####"
"""Marker in GSM8K data: the gold answer follows the last one."""

ReadRow = Callable[[str, Mapping[str, Any], str | None], Example]
"""Converts a row, given its place and the system message of rows without their own."""


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
    prompts = PROMPTS if columns.keys() & set(PROMPTS[3:]) else PROMPTS[:3]
    groups = [group for group in (prompts, ANSWERS) if set(group) & columns.keys()]
    hidden = {*columns, *(name for group in groups for name in group)}
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {name: row[column] for name, column in columns.items() if column in row}


def read_examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    read: ReadRow | None = None,
) -> list[Example]:
    """Convert rows to examples; `system` is the system message of rows without their own.

    columns: columns to take under other names, see `parse_columns`. read: converts a row, see
    `to_example`, which is the default.

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
    bad: list[tuple[str, str]] = []
    names, read = _GivenIds(), read or to_example
    for place, row in rows:
        try:
            examples.append(names.give(read(place, row, system), own=row.get("id") is None))
        except DataError as error:
            bad.append((place, str(error)))
    if bad:
        raise DataError(tell_bad(bad, len(examples) + len(bad)))
    return examples


def with_all_columns(examples: Sequence[Example], others: Sequence[Example] = ()) -> list[Example]:
    """Return the examples with every column that one of them or of the others has, None where a row
    lacks it."""
    columns = dict.fromkeys(name for e in (*examples, *others) for name in e.columns)
    return [
        example
        if len(example.columns) == len(columns)
        else replace(example, columns={name: example.columns.get(name) for name in columns})
        for example in examples
    ]


def tell_bad(bad: Sequence[tuple[str, str]], total: int) -> str:
    """Describe bad rows, given by place and message: the first in full, and where the others are.

    Messages name their places themselves.
    """
    first = bad[0][1]
    if len(bad) == 1:
        return first
    others = ", ".join(place for place, _ in bad[1 : LISTED + 1])
    more = f" and {len(bad) - 1 - LISTED} more" if len(bad) > LISTED + 1 else ""
    return f"{first} {len(bad)} of {total} rows are bad; the others: {others}{more}."


class _GivenIds:
    """The ids given so far, and where."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._seen: Counter[str] = Counter()

    def give(self, example: Example, *, own: bool) -> Example:
        """Return the example with an id of its own; one that was made up may get a suffix.

        Raises: DataError if the row's id is already in use.
        """
        if own:
            self._seen[example.id] += 1
            if self._seen[example.id] > 1:
                name = f"{example.id}-{self._seen[example.id]}"
                example = replace(example, id=name, tracker_key=name)
        if example.id in self._places:
            raise DataError(
                f"{example.place}: the id {example.id!r} is already used in "
                f"{self._places[example.id]}. Make ids unique, or leave them out."
            )
        self._places[example.id] = example.place
        return example


def to_example(place: str, row: Mapping[str, Any], system: str | None) -> Example:
    """Convert one row to an example. Raises: DataError, see `read_examples`."""
    column, prompt = _prompt(place, row)
    messages = _messages(place, row, column, prompt)
    own = next((text for text in (row.get("system"), system) if not is_empty(text)), None)
    if own is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": read_text(place, "system", own)}, *messages)
    answer, tools = _answer(row), _tools(place, row)
    _check_unicode(place, messages, answer, tools, row.get("id"))
    given = row.get("id")
    made = prompt_hash(messages, answer)[:12]
    return Example(
        id=made if given is None else read_text(place, "id", str(given)),
        messages=messages,
        answer=answer,
        columns={name: value for name, value in row.items() if name not in HIDDEN},
        as_text=isinstance(prompt, str),
        tools=tools,
        place=place,
    )


def prompt_hash(messages: Sequence[Mapping[str, Any]], answer: Any = None) -> str:
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


def _prompt(place: str, row: Mapping[str, Any]) -> tuple[str, str | list[Any]]:
    """Return the first prompt of the row that is not empty, after its column."""
    there = [name for name in PROMPTS if name in row]
    filled = [name for name in there if not is_empty(row[name])]
    if there and not filled:
        raise DataError(f"{place}: {there[0]} is empty. Fill it in, or remove the row.")
    if not filled:
        found = ", ".join(f"{name!r:.60}" for name in row) or "none"
        raise DataError(
            f"{place} has no {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}; its columns are {found}. "
            "If one of them is the prompt, name it with --columns prompt=COLUMN."
        )
    column = filled[0]
    value = row[column]
    if column == "messages" and isinstance(value, str):
        value = _listed(place, value)
    if not value or not isinstance(value, (str, list)):
        raise DataError(
            f"{place}: {column} is {value!r:.60}; it must be text or a list of chat messages."
        )
    return column, value


def _listed(place: str, text: str) -> list[Any]:
    """Read the JSON text of chat messages, as files have it whose values are all text."""
    with suppress(ValueError, RecursionError):  # told below
        messages = json.loads(text)
        if isinstance(messages, list):
            return messages
    raise DataError(
        f"{place}: messages is {text!r:.60}; it must be a list of chat messages, or the JSON of "
        "one. If it is a problem in plain text, name it with --columns prompt=messages"
    )


def _messages(
    place: str, row: Mapping[str, Any], column: str, prompt: str | list[Any]
) -> tuple[Mapping[str, Any], ...]:
    if isinstance(prompt, list):
        return read_conversation(place, column, prompt)
    about = row.get(INPUT) if column == "instruction" else None
    if isinstance(about, str) and about.strip():
        prompt = f"{prompt}\n\n{about}"
    return ({"role": "user", "content": prompt},)


def _tools(place: str, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Read the functions that the chat template is given: a list of JSON schemas, or its JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with suppress(ValueError, RecursionError):  # told below
            tools = json.loads(tools or "[]")
    if tools is None or tools == []:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{place}: tools is {row['tools']!r:.60}; it must be a list of JSON schemas. If it is "
            "something else, leave the column out with --columns tools="
        )
    return tuple(tools)


def _check_unicode(place: str, *parts: Any) -> None:
    """Reject halves of characters, which JSON can write but no tokenizer can read."""
    text = json.dumps(parts, ensure_ascii=False, default=repr)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 10]
        raise DataError(
            f"{place} holds half of a character, {text[error.start]!a} (a lone surrogate), in "
            f"{around!a}. Remove it, or write the whole character."
        ) from None


def is_empty(value: Any) -> bool:
    """True of None, a blank text, and a list of nothing else: another column is read instead."""
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


def _answer(row: Mapping[str, Any]) -> Any:
    """The gold answer, None if the row has none; in GSM8K's format the part after `####`."""
    answer = next((row[name] for name in ANSWERS if not is_empty(row.get(name))), None)
    if isinstance(answer, str) and GSM8K in answer:
        return answer.rpartition(GSM8K)[2].strip()
    return answer
