"""Reads the groups that a run has stored in rollouts.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localrl.errors import DataError
from localrl.runs.logs import ROLLOUTS_FORMAT, read_jsonl

ROLLOUTS = "rollouts.jsonl"


def stored_groups(source: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the groups of a file of rollouts, replayed ones left out.

    Raises: DataError if a line is no group.
    """
    for number, record in enumerate(read_jsonl(source), start=1):
        if record.get("format") != ROLLOUTS_FORMAT or not isinstance(record.get("leaves"), list):
            raise DataError(
                f"{source}, line {number} is no group of format {ROLLOUTS_FORMAT}; its format is "
                f"{record.get('format')!r}. Use the version of localrl that wrote it."
            )
        if not record.get("replayed"):
            yield record
