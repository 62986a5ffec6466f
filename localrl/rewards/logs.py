"""Values that reward functions log besides their rewards: numbers, and columns per completion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localrl.records import Group

Row = tuple[str, str]
"""Key of a completion: (example id, text)."""


@dataclass(frozen=True)
class Logs:
    """Everything that was logged over some calls."""

    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Finite numbers by metric name, in the order logged."""
    rows: Mapping[Row, Mapping[str, Any]] = field(default_factory=dict)
    """Values by column, for each completion; the last logged value wins."""

    def means(self) -> dict[str, float]:
        """Mean of each metric over the calls that logged it."""
        return {name: sum(v / len(values) for v in values) for name, values in self.metrics.items()}

    def of(self, group: Group) -> list[Mapping[str, Any]]:
        """The logged columns of each leaf of a group, in the order of its leaves.

        Completions of one prompt with the same text share the values logged last for either.
        """
        return [self.rows.get((group.example.id, leaf.text), {}) for leaf in group.leaves]


class LogCollector:
    """Checks and collects logged values until they are taken.

    warn: called with one line for the first dropped entry of each name.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[tuple[str, str]] = set()
        self._metrics: dict[str, list[float]] = {}
        self._rows: dict[Row, dict[str, Any]] = {}

    def add(self, function: str, logs: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Add `Reply.logs` of one call for these completions."""
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
        """Return everything logged since the last call, and clear it."""
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
    """Replace NaN and infinity, which JSON lacks, by None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)
