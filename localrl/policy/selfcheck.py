"""Self-checks of a loaded model: a measured value beside its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from localrl.errors import ConfigError


@dataclass(frozen=True)
class Check:
    """A measured value beside its limits; a value that is not a number is beyond both."""

    name: str
    value: float
    warn_above: float
    refuse_above: float

    @property
    def verdict(self) -> Literal["ok", "warn", "refuse"]:
        """Verdict on the value."""
        if not self.value <= self.refuse_above:
            return "refuse"
        return "ok" if self.value <= self.warn_above else "warn"

    @property
    def accepted(self) -> bool:
        """True unless the value is beyond the upper limit."""
        return self.verdict != "refuse"

    def __str__(self) -> str:
        limits = f"warns above {self.warn_above:g}, refuses above {self.refuse_above:g}"
        return f"{self.value:.2g} ({limits})"

    def record(self) -> dict[str, Any]:
        """Return the check for a run's events."""
        return {**vars(self), "verdict": self.verdict}


def judge(
    check: Check, fact: str, advice: str, *, strict: bool, warn: Callable[[str], None]
) -> None:
    """Act on a check that should hold. fact, advice: what a bad value shows, and what to do then.

    Raises: ConfigError if the value is beyond the upper limit and `strict`; otherwise a value
    beyond a limit is told.
    """
    found = f"The self-check {check.name} found {check}."
    if check.verdict == "refuse" and strict:
        raise ConfigError(f"{fact} {found} {advice} Or set model.selfcheck=warn to go on.")
    if check.verdict == "refuse":
        warn(f"{fact} {found} {advice}")
    elif check.verdict == "warn":
        warn(f"{fact} {found} Rounding explains less, but it may do no harm.")


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error relative to the spread of the expected logits; NaN stays NaN."""
    spread = expected - expected.mean(axis=-1, keepdims=True)
    scale = max(float(np.sqrt((spread**2).mean())), 1e-6)
    return float(np.sqrt(((found - expected) ** 2).mean())) / scale
