"""Coefficients fitted to the peaks of two short passes, and the file that stores them.

They are stored by model shape, adapters, MLX version and device, the only things they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from localrl.backend import mx
from localrl.memory.estimate import Coefficients, Estimate, Workload
from localrl.memory.sizes import Sizes
from localrl.records import MemoryPlan
from localrl.utils import stored
from localrl.utils.cache import cache_folder

TRUST = (0.05, 0.15, 0.05)
"""Weights of the priors of each factor relative to the measurements: two passes of similar length
say little about how the peak grows with the square of the length."""
LEAST, MOST = 0.25, 4.0
"""Range of plausible factors; one outside it is a measurement error."""
UNEXPLAINED = 0.25
"""Maximum fraction of a peak that the factors may leave unexplained; more is an error too."""


FORMULA = 6
"""Version of the `estimate` formula; increase it with every change, since stored factors are only
valid for the formula they were fitted to."""
FACTORS = ("linear", "quadratic", "head")


@dataclass(frozen=True)
class Probe:
    """One short pass: the estimate from the priors, and the measured peak."""

    predicted: Estimate
    """Estimate with all coefficients 1."""
    peak_bytes: int
    """Peak above the memory in use before the pass."""


def solve(probes: Sequence[Probe]) -> Coefficients | None:
    """Fit factors b, c, h on the priors: peak = b linear + c quadratic + h head for every probe.

    Least squares of the relative errors, shrunk toward 1 by `TRUST`. None if no factors between
    `LEAST` and `MOST` explain the measurements.
    """
    # Gradients are left out: a single pass reaches its peak before most of them exist.
    parts = [(p.predicted.linear, p.predicted.quadratic, p.predicted.head) for p in probes]
    shares = np.array(parts) / np.array([[probe.peak_bytes] for probe in probes])
    matrix = np.concatenate([shares, np.diag(TRUST)])
    aims = np.concatenate([np.ones(len(probes)), np.array(TRUST)])
    factors = np.linalg.lstsq(matrix, aims, rcond=None)[0]
    if np.abs(shares @ factors - 1).max() > UNEXPLAINED:
        return None
    return _checked(*map(float, factors))


def key_of(sizes: Sizes, workload: Workload, plan: MemoryPlan) -> str:
    """Cache key of coefficients: shapes, adapters, MLX version, device and formula version."""
    shape = asdict(replace(sizes, stored_bytes=None))
    adapters = [
        workload.rank,
        workload.lora_layers,
        sorted(workload.lora_keys),
        workload.float_bytes,
    ]
    device = mx.device_info().get("architecture", "")
    formula = [FORMULA, *workload.engine(sizes, dense=plan.dequantise).key(sizes)]
    text = json.dumps([shape, adapters, version("mlx"), str(mx.default_device()), device, formula])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recall(key: str, file: Path | None = None) -> Coefficients | None:
    """Load stored coefficients; None if there are none or they cannot be read."""
    found = stored.recall(file or store(), key)
    try:
        return _checked(*(float(found[name]) for name in FACTORS)) if found else None
    except (ValueError, KeyError, TypeError):
        return None


def remember(key: str, coefficients: Coefficients, file: Path | None = None) -> str | None:
    """Store coefficients; return the reason if that failed, else None."""
    entry = {name: getattr(coefficients, name) for name in FACTORS}
    return stored.remember(file or store(), key, entry)


def store() -> Path:
    """Path of the file, in localrl's cache folder."""
    return cache_folder() / "memory.json"


def _checked(linear: float, quadratic: float, head: float) -> Coefficients | None:
    if not all(LEAST <= factor <= MOST for factor in (linear, quadratic, head)):
        return None
    return Coefficients(linear, quadratic, head, measured=True)
