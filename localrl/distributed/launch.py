"""Reads this process's rank among several, as set by `mlx.launch`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localrl.errors import ConfigError

RANK, RING, JACCL, JACCL_DEVICES = (
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_JACCL_COORDINATOR",
    "MLX_IBV_DEVICES",
)


@dataclass(frozen=True)
class LaunchInfo:
    """The place of one process among several."""

    rank: int
    size: int
    backend: str
    """MLX's name of the backend."""
    host: str
    """Address of rank 0, as the others reach it."""
    port: int
    """Port of the liveness channel: one below the first port that MLX uses itself."""


def find_place(environment: Mapping[str, str] = os.environ) -> LaunchInfo | None:
    """Return this process's launch info; None if it is alone.

    Raises: ConfigError for a launch that uses neither a ring nor JACCL.
    """
    if RANK not in environment:
        return None
    rank = int(environment[RANK])
    if JACCL in environment:
        size = len(_read(environment[JACCL_DEVICES]))
        return _place(rank, size, "jaccl", environment[JACCL])
    if RING in environment:
        hosts = _read(environment[RING])
        return _place(rank, len(hosts), "ring", hosts[0][0]) if len(hosts) > 1 else None
    raise ConfigError(
        f"{RANK} is set, but neither {RING} nor {JACCL}: localrl trains on several machines over "
        "MLX's ring or JACCL. Start it with mlx.launch --backend ring, or unset the variable."
    )


def _read(file: str) -> list[list[str]]:
    text = Path(file).read_text()
    return json.loads(text) if text.strip() else []


def _place(rank: int, size: int, backend: str, address: str) -> LaunchInfo | None:
    host, _, port = address.rpartition(":")
    return LaunchInfo(rank, size, backend, host.strip("[]"), int(port) - 1) if size > 1 else None
