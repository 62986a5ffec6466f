"""Rewards for JSON: equal to the gold value, valid against a schema. Plain Python."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import without_thought
from localrl.rewards.rational import exact
from localrl.rewards.schema import check_schema, same, valid

FENCE = "```"
BLOCKS_TRIED = 20
BARE_TRIED = 500
_OPENING = re.compile(r'\{\s*["}]|\[\s*[]\[{"\-0-9tfnNI]')
_SPACE = " \t\r\n"
NOTHING = object()
"""Marks the absence of JSON; None is JSON's null."""
REFUSED = object()
"""Marks what only looks like JSON: NaN, a key that occurs twice, a number that is too long."""


def json_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    schema: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 if a completion's JSON equals the gold value and fits the schema, else 0.0.

    The JSON of a completion is, after the last </think>, all of its text, or its last ``` block
    that is JSON, or the last object or array in it.

    answer: gold values, or JSON texts of them; `solution` is used where one cannot be read.
        Numbers are compared by value, and true is not 1; the order of keys does not matter.
    schema: JSON Schemas, or JSON texts of them; see `localrl.rewards.schema` for the keywords.
        Without a gold value it is enough to fit the schema.

    None if there is neither a readable gold value nor a schema.

    Raises:
        ValueError: a schema is not JSON, or has an unsupported keyword.
    """
    nothing = [None] * len(completions)
    rows = zip(completions, answer or nothing, solution or nothing, schema or nothing, strict=True)
    return [
        _score(text_of(completion), _gold(first, second), _schema(rule))
        for completion, first, second, rule in rows
    ]


def get_json_reward(schema: Mapping[str, Any] | str) -> Callable[..., list[float | None]]:
    """`json_reward` with one schema for all completions.

    Raises:
        ValueError: the schema is not JSON, or has an unsupported keyword.
    """
    rule = _schema(schema)

    def json_reward(
        completions: Sequence[Completion],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        return _json_reward(completions, answer, solution, [rule] * len(completions))

    return json_reward


_json_reward = json_reward


def find_json(text: str) -> Any:
    """The JSON value of a completion, see `json_reward`; `NOTHING` if there is none."""
    text = without_thought(text)
    whole = _parse(text)
    if whole is not NOTHING:
        return _accept(whole)
    for block in text.split(FENCE)[1::2][: -BLOCKS_TRIED - 1 : -1]:
        first, newline, rest = block.partition("\n")
        named = newline and first.strip().isalnum()
        value = _parse(rest if named else block)
        if value is not NOTHING:
            return _accept(value)
    return _accept(_last_bare(text))


def parse(text: str) -> Any:
    """Parse a JSON text; `NOTHING` if it is not JSON.

    Decimals are exact fractions, so that 1e400 is not 1e500. NaN, infinity, a key that occurs
    twice in an object, and a number of more than 1000 digits are refused.
    """
    return _accept(_parse(text))


class _Reader:
    """A JSON decoder that reads to the end of what it refuses, so that nothing inside is taken."""

    def __init__(self) -> None:
        self._bad = False
        self._decoder = json.JSONDecoder(
            parse_constant=self._refuse,
            parse_float=self._number,
            parse_int=self._number,
            object_pairs_hook=self._object,
        )

    def read(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, or `REFUSED`, and where it ends."""
        self._bad = False
        value, end = self._decoder.raw_decode(text, start)
        return REFUSED if self._bad else value, end

    def _refuse(self, constant: str) -> None:
        self._bad = True

    def _number(self, digits: str) -> Fraction | int | None:
        value = exact(digits)
        if value is None:
            self._bad = True
            return None
        return int(value) if digits.lstrip("-").isdigit() else value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        self._bad |= len(made) < len(pairs)
        return made


def _accept(value: Any) -> Any:
    return NOTHING if value is REFUSED else value


def _parse(text: str) -> Any:
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = _Reader().read(text, start)
    except (ValueError, RecursionError):
        return NOTHING
    return NOTHING if text[end:].strip(_SPACE) else value


def _last_bare(text: str) -> Any:
    """The last object or array in a text that is not inside another, or `REFUSED`.

    Only the first `BARE_TRIED` positions where one could begin are tried.
    """
    reader, found, place = _Reader(), NOTHING, 0
    for _ in range(BARE_TRIED):
        opening = _OPENING.search(text, place)
        if opening is None:
            break
        try:
            found, place = reader.read(text, opening.start())
        except json.JSONDecodeError as error:
            place = max(opening.start() + 1, error.pos)
        except RecursionError:
            break
    return found


def _score(text: str, gold: Any, schema: Any) -> float | None:
    if gold is NOTHING and schema is None:
        return None
    value = find_json(text)
    right = value is not NOTHING and (gold is NOTHING or same(value, gold))
    return float(right and (schema is None or valid(value, schema)))


def _gold(*values: Any) -> Any:
    """The first of these that can be read."""
    for value in values:
        read = parse(value) if isinstance(value, str) else value
        if value is not None and read is not NOTHING:
            return read
    return NOTHING


def _schema(value: Any) -> Any:
    """Parse and check a schema; None if there is none."""
    schema = parse(value) if isinstance(value, str) else value
    if schema is NOTHING:
        raise ValueError(f"the schema {value!r:.80} is not JSON")
    if schema is not None:
        check_schema(schema)
    return schema
