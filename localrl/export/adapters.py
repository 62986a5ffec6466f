"""Adapter folders that mlx-lm and PEFT both read, written whole and checked when read.

adapter_config.json          the keys of mlx-lm and those of PEFT
adapters.safetensors         the weights as mlx-lm names them
adapter_model.safetensors    the same for PEFT, where the family allows: see `peft`
localrl.json                 checksums, rank and scale, the base model's name, versions
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from localrl.backend import mx, tree_flatten
from localrl.errors import CheckpointError, ConfigError
from localrl.export import peft
from localrl.export.base import is_hub_id
from localrl.export.tensors import check_adapter, checksum, read_json, read_tensors, save_tensors
from localrl.policy.lora import LoRALayer

FORMAT = 1
CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
NOTE = "localrl.json"


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA adapters without their model."""

    weights: Mapping[str, mx.array]
    """Arrays by mlx-lm name: `<layer>.lora_a` (inputs, rank), `<layer>.lora_b` (rank, outputs), or,
    of stacked experts, (experts, rank, inputs) and (experts, outputs, rank)."""
    rank: int
    scale: float
    layers: int
    """Number of adapted blocks, counted from the last, as in mlx-lm; 0 means all."""
    keys: tuple[str, ...]
    """Paths of the adapted layers inside a block."""
    model_type: str | None = None
    """Model family as named in config.json; None if unknown."""
    base_id: str | None = None
    """Hub id of the unquantised base model; None if unknown."""

    def layers_of(self, blocks: int) -> int:
        """Return `layers` for a model with this many blocks: 0 if all are adapted."""
        return self.layers if 0 < self.layers < blocks else 0


def adapter_of(model: Any, *, base_id: str | None = None) -> Adapter:
    """Extract the adapters of a model. The arrays are shared with the model."""
    adapted = {
        (index, path): module
        for index, block in enumerate(model.layers)
        for path, module in block.named_modules()
        if isinstance(module, LoRALayer)
    }
    layer = next(iter(adapted.values()))
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    return Adapter(
        weights={
            name: array
            for name, array in parameters.items()
            if name.rpartition(".")[2] in ("lora_a", "lora_b")
        },
        rank=layer.lora_a.shape[1],
        scale=layer.scale,
        layers=len(model.layers) - min(index for index, _ in adapted),
        keys=tuple(dict.fromkeys(path for _, path in adapted)),
        model_type=getattr(model, "model_type", None),
        base_id=base_id,
    )


def write_adapter(adapter: Adapter, folder: Path) -> str | None:
    """Write an adapter folder; return why the PEFT files were left out, or None.

    All files are first completed in a temporary folder next to this one. A new folder appears at
    once; an earlier adapter of ours is replaced file by file, checksums last, so a mixture of two
    is detected when it is read.

    Raises: CheckpointError if the adapter is not finite or cannot be written, or if the folder
    contains something that is not an adapter written by localrl.
    """
    check_adapter(adapter.weights, adapter.rank, folder)
    try:
        _refuse_others(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            reason = _write_files(adapter, fresh)
            _put_in_place(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"Cannot write the adapter to {folder}: {error}.") from error
    return reason


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder written by localrl, mlx-lm or PEFT.

    Raises: ConfigError if there is none, or if its kind is not supported; CheckpointError, naming
    the file, if it is damaged: checksums, missing tensors, NaN.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"There is no adapter in {folder} (no {CONFIG}).")
    note = read_json(folder / NOTE) if (folder / NOTE).exists() else None
    if note is not None:
        _check_note(note, folder)
    config = read_json(folder / CONFIG)
    if (folder / WEIGHTS).exists() or "lora_parameters" in config:
        adapter, file = _read_mlx(config, folder), folder / WEIGHTS
    else:
        file = folder / PEFT_WEIGHTS
        tensors = read_tensors(file)
        adapter = Adapter(**peft.from_peft(config, tensors, file))
    check_adapter(adapter.weights, adapter.rank, file)
    base_id = config.get("base_model_name_or_path")
    if note is not None:
        _compare(note, adapter, folder)
        adapter = replace(adapter, model_type=note.get("model_type"))
        base_id = note.get("base_model")
    return replace(adapter, base_id=base_id if is_hub_id(base_id) else None)


def peft_note(folder: Path) -> str | None:
    """Return the reason an adapter folder of ours has no PEFT files; None if it has them.

    Raises: ConfigError if localrl did not write the folder.
    """
    if not (folder / NOTE).is_file():
        raise ConfigError(f"{folder} has no {NOTE}, so localrl did not write that adapter.")
    return read_json(folder / NOTE).get("peft_left_out")


def _write_files(adapter: Adapter, folder: Path) -> str | None:
    """Write all files of an adapter; return why the PEFT files are not among them."""
    reason = peft.why_not(adapter.model_type, adapter.weights)
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": adapter.layers or 1 + max(peft.blocks(adapter.weights)),
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": list(adapter.keys),
        },
    }
    names = [WEIGHTS]
    save_tensors(folder / WEIGHTS, adapter.weights)
    if reason is None:
        family, weights = str(adapter.model_type), adapter.weights
        config |= peft.config(family, weights, adapter.rank, adapter.scale, adapter.base_id)
        save_tensors(folder / PEFT_WEIGHTS, peft.to_peft(family, weights), {"format": "pt"})
        names.append(PEFT_WEIGHTS)
    _write_json(folder / CONFIG, config)
    note = {
        "format": FORMAT,
        "sha256": {name: checksum(folder / name) for name in names},
        "rank": adapter.rank,
        "scale": adapter.scale,
        "model_type": adapter.model_type,
        "base_model": adapter.base_id,
        "peft_left_out": reason,
        "versions": {name: _version(name) for name in ("localrl", "mlx", "mlx-lm")},
    }
    _write_json(folder / NOTE, note)
    return reason


def _put_in_place(fresh: Path, folder: Path) -> None:
    fresh.chmod(0o755)
    _sync(fresh)
    if not folder.exists() or not any(folder.iterdir()):
        fresh.rename(folder)  # also replaces an empty folder
    else:
        if not (fresh / PEFT_WEIGHTS).exists():
            (folder / PEFT_WEIGHTS).unlink(missing_ok=True)
        for name in (WEIGHTS, PEFT_WEIGHTS, CONFIG, NOTE):
            if (fresh / name).exists():
                (fresh / name).replace(folder / name)
        fresh.rmdir()
        _sync(folder)
    _sync(folder.parent)


def _refuse_others(folder: Path) -> None:
    """Refuse to overwrite files that are not ours.

    Raises: CheckpointError if the folder contains other files.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found and NOTE not in found:
        raise CheckpointError(
            f"{folder} contains {', '.join(sorted(found)[:3])} and no {NOTE}, so localrl "
            "did not write it. Nothing was written there; choose another folder."
        )


def _check_note(note: Mapping[str, Any], folder: Path) -> None:
    """Check format and checksums.

    Raises: CheckpointError if a weight file is not the one that was written.
    """
    if note.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / NOTE} has format {note.get('format')!r}; this localrl reads {FORMAT}. "
            "Install the localrl version that wrote it."
        )
    sums = note.get("sha256")
    if not isinstance(sums, dict) or WEIGHTS not in sums:
        raise CheckpointError(f"{folder / NOTE} has no checksum of {WEIGHTS}: it is damaged.")
    there = {name for name in (WEIGHTS, PEFT_WEIGHTS) if (folder / name).exists()}
    for name in sorted(there | sums.keys()):
        if name not in there:
            raise CheckpointError(f"{folder / name} is missing, although {NOTE} lists it.")
        if checksum(folder / name) != sums.get(name):
            raise CheckpointError(
                f"{folder / name} is not the file that was written: its checksum differs from "
                f"{NOTE}. It is damaged, modified or only partly saved; use another copy."
            )


def _compare(note: Mapping[str, Any], adapter: Adapter, folder: Path) -> None:
    for name in ("rank", "scale"):
        if note.get(name) != getattr(adapter, name):
            raise CheckpointError(
                f"{folder / CONFIG} says {name} {getattr(adapter, name)}, {NOTE} says "
                f"{note.get(name)}: one of the files was modified. Use another copy."
            )


def _read_mlx(config: Mapping[str, Any], folder: Path) -> Adapter:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ConfigError(f"The adapter in {folder} is of type {kind!r}; only lora is supported.")
    tensors = read_tensors(folder / WEIGHTS)
    lora = config.get("lora_parameters")
    try:
        assert isinstance(lora, dict)
        rank, scale, layers = int(lora["rank"]), float(lora["scale"]), int(config["num_layers"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} lacks num_layers, or rank and scale in lora_parameters ({error}); "
            "mlx-lm needs them."
        ) from None
    keys = lora.get("keys") or peft.keys(tensors)
    return Adapter(tensors, rank, scale, max(0, layers), tuple(keys))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make changes in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems do not support it and do not need it
        pass
    finally:
        os.close(descriptor)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
