"""Rewards for JSON: equal to the gold value, valid against a schema. Plain Python."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import without_thought
from localrl.rewards.schema import check_schema, same, valid

FENCE = "```"
BLOCKS_TRIED = 20
BARE_TRIED = 500
_OPENING = re.compile(r'\{\s*["}]|\[\s*[]\[{"\-0-9tfn]')
NOTHING = object()
"""Marks the absence of JSON; None is JSON's null."""


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

    answer: gold values, or JSON texts of them; `solution` is used where one is missing.
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
        _score(text_of(completion), _gold(second if first is None else first), _schema(rule))
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
    whole = parse(text)
    if whole is not NOTHING:
        return whole
    for block in text.split(FENCE)[1::2][: -BLOCKS_TRIED - 1 : -1]:
        first, newline, rest = block.partition("\n")
        named = newline and first.strip().isalnum()
        value = parse(rest if named else block)
        if value is not NOTHING:
            return value
    return _last_bare(text)


def parse(text: str) -> Any:
    """Parse a JSON text; `NOTHING` if it is not JSON. NaN and infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOTHING


def _last_bare(text: str) -> Any:
    """The last object or array in a text that is not inside another.

    Only the first `BARE_TRIED` positions where one could begin are tried.
    """
    decoder, found, place = json.JSONDecoder(parse_constant=_refuse), NOTHING, 0
    for _ in range(BARE_TRIED):
        opening = _OPENING.search(text, place)
        if opening is None:
            break
        try:
            found, place = decoder.raw_decode(text, opening.start())
        except json.JSONDecodeError as error:
            place = max(opening.start() + 1, error.pos)
        except ValueError:
            place = opening.start() + 1  # NaN, or an integer of thousands of digits
        except RecursionError:
            break
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _score(text: str, gold: Any, schema: Any) -> float | None:
    if gold is NOTHING and schema is None:
        return None
    value = find_json(text)
    right = value is not NOTHING and (gold is NOTHING or same(value, gold))
    return float(right and (schema is None or valid(value, schema)))


def _gold(value: Any) -> Any:
    if value is None:
        return NOTHING
    return parse(value) if isinstance(value, str) else value


def _schema(value: Any) -> Any:
    """Parse and check a schema; None if there is none."""
    schema = parse(value) if isinstance(value, str) else value
    if schema is NOTHING:
        raise ValueError(f"the schema {value!r:.80} is not JSON")
    if schema is not None:
        check_schema(schema)
    return schema
