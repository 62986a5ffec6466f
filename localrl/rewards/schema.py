"""A small part of JSON Schema, and equality of JSON values. Plain Python.

Supported keywords: `type` (one or a list of them), `properties`, `required`,
`additionalProperties` (true, false or a schema), `items` (one schema), `enum`, with the standard's
meaning. `$schema`, `$id`, `title`, `description`, `default`, `examples` and `$comment` do not
affect validity and are allowed. Any other keyword is an error, so that nothing unchecked looks
checked. true and false are schemas too.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

NOTES = frozenset(["$schema", "$id", "title", "description", "default", "examples", "$comment"])
KEYWORDS = frozenset(["type", "properties", "required", "additionalProperties", "items", "enum"])
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")


def check_schema(schema: Any, place: str = "schema") -> None:
    """Raise `ValueError`, naming the place, if a schema is not supported."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{place} is {schema!r:.60}; a schema is an object, true or false")
    unknown = [key for key in schema if key not in KEYWORDS and key not in NOTES]
    if unknown:
        known = ", ".join(sorted(KEYWORDS))
        raise ValueError(f"{place} has the keyword {unknown[0]!r}; supported keywords are {known}")
    _check_values(schema, place)
    parts = {f"properties.{k}": part for k, part in schema.get("properties", {}).items()}
    parts |= {k: schema[k] for k in ("items", "additionalProperties") if k in schema}
    for name, part in parts.items():
        check_schema(part, f"{place}.{name}")


def _check_values(schema: Mapping[str, Any], place: str) -> None:
    wrong = [name for name in _types(schema) if name not in TYPES]
    if wrong:
        raise ValueError(f"{place}.type is {wrong[0]!r}; it must be one of {', '.join(TYPES)}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{place}.required is {required!r:.60}; it must be a list of names")
    if not isinstance(schema.get("properties", {}), Mapping):
        raise ValueError(
            f"{place}.properties is {schema['properties']!r:.60}; it must be an object"
        )
    if not isinstance(schema.get("enum", []), list):
        raise ValueError(f"{place}.enum is {schema['enum']!r:.60}; it must be a list")


def valid(value: Any, schema: Any) -> bool:
    """True if a JSON value fits a schema that `check_schema` has accepted."""
    if isinstance(schema, bool):
        return schema
    types = _types(schema)
    if types and not any(_is(value, name) for name in types):
        return False
    if "enum" in schema and not any(same(value, allowed) for allowed in schema["enum"]):
        return False
    if isinstance(value, list):
        return all(valid(item, schema.get("items", True)) for item in value)
    return not isinstance(value, dict) or _valid_object(value, schema)


def same(one: Any, other: Any) -> bool:
    """True if two JSON values are equal: numbers by value, true is not 1, key order is ignored."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) or isinstance(other, float):
        return _float(one) == _float(other)
    return one == other


def _float(value: Any) -> Any:
    """The nearest float of a fraction, since the data's own floats are rounded; else the value."""
    try:
        return float(value) if isinstance(value, Fraction) else value
    except OverflowError:
        return value


def _valid_object(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    return all(name in value for name in schema.get("required", [])) and all(
        valid(part, properties.get(name, others)) for name, part in value.items()
    )


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, (int, float, Fraction)):
        return name == "number" or (name == "integer" and value == value // 1)
    if value is None:
        return name == "null"
    kinds = {"object": dict, "array": list, "string": str}
    return name in kinds and isinstance(value, kinds[name])
