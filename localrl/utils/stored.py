"""Values by key in a JSON file of the cache folder: measurements that can be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def recall(file: Path, key: str) -> dict[str, Any] | None:
    """Return the value stored under a key; None if there is none or the file cannot be read."""
    found = _read(file).get(key)
    return found if isinstance(found, dict) else None


def remember(file: Path, key: str, value: dict[str, Any]) -> str | None:
    """Store a value beside those of other keys; return the reason if that failed, else None."""
    text = json.dumps({**_read(file), key: value}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(text)
        beside.replace(file)
    except OSError as error:
        return f"{file} cannot be written ({error.strerror})"
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
