"""What reward functions log besides their rewards: numbers, and columns beside completions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.records import Group

Row = tuple[str, str]
"""Of a completion: the example's id, and the text."""


@dataclass(frozen=True)
class Logs:
    """Everything that was logged in some calls."""

    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Finite numbers by the name they were logged under, in order."""
    rows: Mapping[Row, Mapping[str, Any]] = field(default_factory=dict)
    """By completion: values by column. What was logged last counts."""

    def means(self) -> dict[str, float]:
        """Mean of each metric over the calls that logged it."""
        return {name: sum(v / len(values) for v in values) for name, values in self.metrics.items()}

    def of(self, group: Group) -> list[Mapping[str, Any]]:
        """The logged columns of each leaf of a group, however its leaves were put together.

        Completions of one prompt with the same text share what was logged last for either.
        """
        return [self.rows.get((group.example.id, leaf.text), {}) for leaf in group.leaves]


class LogCollector:
    """Checks and collects what calls have logged until it is taken.

    warn: gets one line for the first entry of each name that is dropped.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[tuple[str, str]] = set()
        self._metrics: dict[str, list[float]] = {}
        self._rows: dict[Row, dict[str, Any]] = {}

    def add(self, function: str, logs: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Take in `Reply.logs` of one call for these completions."""
        for name, value in logs.get("metrics", ()):
            if math.isfinite(value):
                self._metrics.setdefault(name, []).append(value)
            else:
                self._drop(function, name, f"the metric {name!r} as {value}")
        columns: dict[str, list[Any]] = {}
        for column, values in logs.get("extra", ()):
            columns.setdefault(column, []).extend(values)
        for column, values in columns.items():
            if len(values) == len(rows):
                self._add_column(column, values, rows)
            else:
                told = f"{len(values)} values in the column {column!r} for {len(rows)} completions"
                self._drop(function, column, told)

    def take(self) -> Logs:
        """What came since the last time."""
        logs = Logs(self._metrics, self._rows)
        self._metrics, self._rows = {}, {}
        return logs

    def _add_column(self, column: str, values: Sequence[Any], rows: Sequence[Row]) -> None:
        for row, value in zip(rows, values, strict=True):
            self._rows.setdefault(row, {})[column] = _without_nan(value)

    def _drop(self, function: str, name: str, told: str) -> None:
        if (function, name) not in self._warned:
            self._warned.add((function, name))
            self._warn(
                f"Reward {function!r} logged {told}; the entry was dropped. "
                "Further entries with this name are dropped without a warning."
            )


def _without_nan(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not know."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)
