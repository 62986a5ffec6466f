"""Tensor files: synced to disk when written, read only if intact."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.errors import CheckpointError


def save_tensors(
    path: Path, tensors: Mapping[str, mx.array], about: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors with `about` as metadata, and sync to disk."""
    mx.save_safetensors(str(path), dict(tensors), metadata=about or {"format": "mlx"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file; its header must describe the file exactly.

    Raises: CheckpointError if it is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # stricter about the header than MLX
            pass
        tensors: Any = mx.load(str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. It is truncated or damaged; use another copy."
        ) from None
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CheckpointError if the file contains none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not contain a JSON object.")
    return content


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_adapter(weights: Mapping[str, mx.array], rank: int, path: Path) -> None:
    """Check that every adapter has both matrices, of this rank, with finite values.

    Raises: CheckpointError naming the tensor and the file.
    """
    if not weights:
        raise CheckpointError(f"{path}: the adapter has no tensors.")
    for name, array in weights.items():
        layer, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise CheckpointError(f"{path}: {name} is not part of a LoRA adapter.")
        other = f"{layer}.{'lora_b' if half == 'lora_a' else 'lora_a'}"
        if other not in weights:
            raise CheckpointError(f"{path}: {other} is missing; the adapter is incomplete.")
        ranks = {2: ("lora_b", "lora_a"), 3: ("", "lora_a", "lora_b")}.get(array.ndim)
        if ranks is None or array.shape[ranks.index(half)] != rank:
            raise CheckpointError(
                f"{path}: {name} has shape {list(array.shape)}, which does not match rank {rank}."
            )
        if not mx.isfinite(array).all().item():
            raise CheckpointError(
                f"{path}: {name} contains NaN or infinity; the adapter is unusable."
            )
