"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localrl.evaluate import Evaluation
from localrl.records import MemoryPlan


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    folder: Path
    steps: int
    train_s: float
    """Seconds spent in steps, including those before a resume, without evaluations."""
    base: Evaluation | None
    adapter: Evaluation | None
    plan: MemoryPlan
    """The plan in force at the end."""
    peak_bytes: int
    """Peak memory held by MLX."""
