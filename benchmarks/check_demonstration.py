"""Check a run of the demonstration: it has learned, and sampler and update agree.

    localrl train --out runs/mac-demo
    python benchmarks/check_demonstration.py runs/mac-demo

Prints a table in Markdown, and exits with 1 if a value is beyond its limit, with 2 if the run has
no such value. For GPUs, on which no byte is promised.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GAP = "sampling/sampling_logp_difference/mean"


@dataclass(frozen=True)
class Check:
    """A value of a run beside its limit."""

    name: str
    value: float | None
    limit: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """True if the value is known and within its limit."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value < self.limit

    def __str__(self) -> str:
        value = "missing" if self.value is None else f"{self.value:.4f}"
        sign = "at least" if self.at_least else "below"
        return f"| {self.name} | {value} | {sign} {self.limit} | {'ok' if self.holds else 'FAIL'} |"


def checks(run: Path) -> Iterator[Check]:
    """Read a run's folder.

    Raises: OSError or ValueError if it has no evaluation or no metrics.
    """
    evaluation = json.loads((run / "eval.json").read_bytes())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = [float(line[GAP]) for line in lines if line.get(GAP) is not None]
    yield Check("pass@1 after training", _rate(evaluation, "adapter"), 0.9, at_least=True)
    yield Check("pass@1 before", _rate(evaluation, "base"), 0.5, at_least=False)
    largest = max(gaps, default=None)
    yield Check("gap between update and sampler, nats, largest step", largest, 0.01, at_least=False)


def _rate(evaluation: dict[str, Any], side: str) -> float | None:
    return (evaluation.get(side) or {}).get("pass@1")


def main(arguments: list[str]) -> int:
    """Print the table of a run; return the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = list(checks(Path(arguments[0])))
    except (OSError, ValueError) as error:
        print(f"{arguments[0]} is not a finished run: {error}", file=sys.stderr)
        return 2
    print("| check | value | limit | |\n|---|---|---|---|")
    print(*found, sep="\n")
    if any(check.value is None for check in found):
        return 2
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
