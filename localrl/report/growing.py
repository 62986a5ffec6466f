"""Reads the logs of a run while they grow: each call looks only at the lines that were added."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

TAIL = 256
"""Bytes before the last position that show whether a file was cut and written anew."""
KEPT = "learned from"
FATE = re.compile(
    rb'"kept": (true|false), "reason": (?:null|"([^"\\]*)")'
    rb'(?:, "replayed": (?:true|false))?\}\s*$'
)
"""End of a line of rollouts.jsonl, so that a group can be counted without being parsed; in an older
log, lines say last whether their group was replayed."""


class GrowingFile:
    """A file of lines and the position up to which it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0
        self._tail = b""

    def added(self, start_over: Callable[[], None]) -> Iterator[tuple[int, bytes]]:
        """Yield the byte offset and the bytes of each complete line added since the last call.

        start_over: called first if earlier lines are gone: a resumed run cuts those it repeats.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._forget(start_over)
            return
        with file:
            file.seek(self._end - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._forget(start_over)
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is just being written
                yield self._end, line
                self._end += len(line)
                self._tail = line[-TAIL:]

    def _forget(self, start_over: Callable[[], None]) -> None:
        if self._end:
            self._end, self._tail = 0, b""
            start_over()


class JsonLog:
    """The objects in a growing file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self.unread = 0
        """Number of complete lines that are no JSON object."""
        self._file = GrowingFile(path)

    def read(self) -> list[dict[str, Any]]:
        """Return all objects, after parsing the lines that were added."""
        for _, line in self._file.added(self._start_over):
            record = parsed(line)
            if record is None:
                self.unread += 1
            else:
                self.records.append(record)
        return self.records

    def _start_over(self) -> None:
        self.records, self.unread = [], 0


class GroupIndex:
    """An index of a growing rollouts.jsonl: where groups begin, and how many had which outcome."""

    def __init__(self, path: Path) -> None:
        self.path = path / "rollouts.jsonl"
        self.offsets: list[int] = []
        self.reasons: Counter[str] = Counter()
        """Counts of groups: those learned from, and those not learned from by reason."""
        self.cuts = 0
        """Number of times that the file was found cut: offsets before are not to be trusted."""
        self._file = GrowingFile(self.path)

    def read(self) -> GroupIndex:
        """Add the groups that were written since the last call."""
        for offset, line in self._file.added(self._start_over):
            fate = _fate(line)
            if fate is not None:
                self.offsets.append(offset)
                self.reasons[fate] += 1
        return self

    def _start_over(self) -> None:
        self.offsets, self.reasons = [], Counter()
        self.cuts += 1


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if it is none."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        return record if isinstance(record, dict) else None
    return None


def group_of(line: bytes) -> dict[str, Any] | None:
    """Return the group in a line of rollouts.jsonl; None if it is none."""
    record = parsed(line)
    is_group = record is not None and all(
        isinstance(record.get(name), list) for name in ("messages", "nodes", "leaves")
    )
    return record if is_group else None


def _fate(line: bytes) -> str | None:
    """Return what became of the group in a line; None if there is no group in it."""
    found = FATE.search(line, max(0, len(line) - TAIL))
    if found:
        kept, reason = found[1] == b"true", (found[2] or b"").decode("utf-8", "replace")
    else:
        record = group_of(line)
        if record is None:
            return None
        kept, reason = bool(record.get("kept")), record.get("reason")
    return KEPT if kept else str(reason or "not learned from")
