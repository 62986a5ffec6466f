"""From the peaks of two short passes to coefficients, and the file that keeps them for next time.

Kept by model shape, adapters, MLX version and device, since they depend on these and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from localrl.backend import mx
from localrl.memory.estimate import Coefficients, Estimate, Workload
from localrl.memory.sizes import Sizes
from localrl.records import MemoryPlan
from localrl.utils.cache import cache_folder

TRUST = 0.05
"""Weight of the priors beside the measurements: two passes of like length say little on how their
peak grows with the square."""
LEAST, MOST = 0.25, 4.0
"""A factor beyond these is a mistake in measuring, not a machine."""
UNEXPLAINED = 0.25
"""So is a share of a peak, above this, that the factors leave unexplained."""


FORMULA = 5
"""Of `estimate`: one more when it changes, since factors on another mean nothing."""
FACTORS = ("linear", "quadratic", "head")


@dataclass(frozen=True)
class Probe:
    """One short pass: what the priors made of it, and what it took."""

    predicted: Estimate
    """With coefficients 1."""
    peak_bytes: int
    """Above what was there before the pass."""


def solve(probes: Sequence[Probe]) -> Coefficients | None:
    """Factors b, c, h on the priors with peak = b linear + c quadratic + h head for every probe.

    Least squares of the relative errors, drawn to 1 by `TRUST`. None when no factors between
    `LEAST` and `MOST` explain what was measured.
    """
    # Gradients have no part in it: a single pass has its peak before most of them are there.
    parts = [(p.predicted.linear, p.predicted.quadratic, p.predicted.head) for p in probes]
    shares = np.array(parts) / np.array([[probe.peak_bytes] for probe in probes])
    matrix = np.concatenate([shares, TRUST * np.eye(3)])
    aims = np.concatenate([np.ones(len(probes)), np.full(3, TRUST)])
    factors = np.linalg.lstsq(matrix, aims, rcond=None)[0]
    if np.abs(shares @ factors - 1).max() > UNEXPLAINED:
        return None
    return _checked(*map(float, factors))


def key_of(sizes: Sizes, workload: Workload, plan: MemoryPlan) -> str:
    """What coefficients hold for: shapes, adapters, MLX version, device, the formula they scale."""
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
    """The coefficients that were stored; None when there are none that can be read."""
    try:
        found = json.loads((file or store()).read_bytes())[key]
        return _checked(*(float(found[name]) for name in FACTORS))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(key: str, coefficients: Coefficients, file: Path | None = None) -> str | None:
    """Store coefficients; returns why that was not possible, or None when it was."""
    path = file or store()
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    entry = {name: getattr(coefficients, name) for name in FACTORS}
    text = json.dumps({**(known if isinstance(known, dict) else {}), key: entry}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    return None


def store() -> Path:
    """The file, in localrl's cache."""
    return cache_folder() / "memory.json"


def _checked(linear: float, quadratic: float, head: float) -> Coefficients | None:
    if not all(LEAST <= factor <= MOST for factor in (linear, quadratic, head)):
        return None
    return Coefficients(linear, quadratic, head, measured=True)
