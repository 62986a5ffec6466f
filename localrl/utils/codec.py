"""Converts records to plain data and back: used by checkpoints instead of pickle.

JSON alone would turn tuples into lists, keys into text and arrays into numbers, so each of these is
marked. Floats survive exactly: Python writes as many digits as needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from localrl.errors import CheckpointError

PLAIN = (str, int, float, bool, type(None))

Types = Mapping[str, type]
"""The dataclasses that may occur, by name."""
Makers = Mapping[str, Callable[..., Any]]
"""Makers of a record from its fields, by its name: the dataclass, or a function."""


def encode(value: Any, types: Types) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the value in a form that JSON can hold, and its arrays by name.

    Raises: TypeError for a value that is neither plain, a container, an array nor one of the types.
    """
    arrays: dict[str, np.ndarray] = {}
    return _encode(value, types, arrays), arrays


def decode(tree: Any, arrays: Mapping[str, np.ndarray], types: Makers) -> Any:
    """Return the value that `encode` was given.

    Raises: CheckpointError for a tree that `encode` did not make, or with an unknown type in it.
    """
    try:
        return _decode(tree, arrays, types)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The state cannot be read ({type(error).__name__}: {error}). It was written by "
            "another version of localrl; continue with that version, or start a new run."
        ) from error


def to_bytes(value: Any, types: Types) -> bytes:
    """Return the value as bytes: a line of JSON with each array's type and shape, then the arrays.

    Raises: the same errors as `encode`.
    """
    tree, arrays = encode(value, types)
    told = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    head = json.dumps({"tree": tree, "arrays": told}).encode()
    return b"\n".join([head, b"".join(array.tobytes() for array in arrays.values())])


def from_bytes(data: bytes, types: Types) -> Any:
    """Return the value that `to_bytes` was given.

    Raises: CheckpointError for data that `to_bytes` did not make.
    """
    start = data.index(b"\n") + 1
    head, arrays = json.loads(data[:start]), {}
    for name, kind, shape in head["arrays"]:
        count = math.prod(shape)
        # Copied, because a view would keep all of the bytes alive.
        arrays[name] = np.frombuffer(data, kind, count, start).reshape(shape).copy()
        start += arrays[name].nbytes
    return decode(head["tree"], arrays, types)


def _encode(value: Any, types: Types, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, types, arrays) for item in value]}
    if isinstance(value, list):
        return [_encode(item, types, arrays) for item in value]
    if isinstance(value, Mapping):
        pairs = [[_encode(part, types, arrays) for part in pair] for pair in value.items()]
        return {"mapping": pairs}
    if is_dataclass(value):
        name = type(value).__name__
        if types.get(name) is not type(value):
            raise TypeError(f"{type(value)} is not one of the types of a state")
        own = {f.name: _encode(getattr(value, f.name), types, arrays) for f in fields(value)}
        return {"record": name, "fields": own}
    # No isinstance: a number type of another library would come back as a different type.
    if type(value) in PLAIN:
        return value
    raise TypeError(f"a value of type {type(value)} cannot be part of a state")


def _decode(tree: Any, arrays: Mapping[str, np.ndarray], types: Makers) -> Any:
    if isinstance(tree, list):
        return [_decode(item, arrays, types) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    if "tuple" in tree:
        return tuple(_decode(item, arrays, types) for item in tree["tuple"])
    if "mapping" in tree:
        return dict([_decode(part, arrays, types) for part in pair] for pair in tree["mapping"])
    own = {name: _decode(item, arrays, types) for name, item in tree["fields"].items()}
    return types[tree["record"]](**own)
