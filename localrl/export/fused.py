"""Fusing a model with its adapter into a new folder, and measuring how much of the update is kept.

Adding an update to 4-bit weights and quantising them again rounds most of it away. Therefore the
fused model is dense: float16, or float32 if the update is too small for that. The kept share is
measured on the written files.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from localrl.backend import mx, nn, tree_flatten, tree_unflatten
from localrl.errors import CheckpointError, ConfigError
from localrl.export.adapters import Adapter
from localrl.export.base import front_matter
from localrl.export.tensors import read_json
from localrl.policy.lora import LoRALayer, adapted_layers, attach, fill
from localrl.policy.model import load_model
from localrl.policy.precision import dense_layer, weight_of
from localrl.policy.rope import rope_settings

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
MOST_FLOAT16 = 65504.0
SMALL_UPDATE = 1e-3
"""Relative update size, |D| / |W|, below which float16 rounds a fifth of it away."""
TOKENIZER_FILES = (
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "*.model", "generation_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class LayerUpdate:
    """Fidelity of one layer's update D, with base weight W and fused weight F."""

    name: str
    size: float
    """|D| / |W|."""
    error: float
    """|(F - W) - D| / |D|."""
    cosine: float
    """Cosine of F - W and D."""
    share: float
    """(F - W) D / |D|^2: 1 if all of D is in F, regardless of added noise; 0 if none is."""


@dataclass(frozen=True)
class Fused:
    """A written fused model."""

    folder: Path
    dtype: str
    bits: int | None
    """Bits of quantised weights; None if dense."""
    reason: str
    """Reason for the number format."""
    layers: tuple[LayerUpdate, ...]
    """Layers whose update is not zero."""


def export_fused(
    adapter: Adapter,
    model_folder: Path,
    out: Path,
    *,
    base_bits: int = 0,
    dtype: str | None = None,
    bits: int | None = None,
) -> Fused:
    """Write the model with the adapter merged in to the folder `out`, all at once.

    base_bits: bits to which the run quantised the model on loading; 0: not quantised.
    bits: quantise the fused weights again, with the loss this causes.

    Raises: ConfigError if `out` is not empty, if the adapter does not fit the model or the
    values do not fit `dtype`; CheckpointError if it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty. Choose another folder with --out.")

    def load() -> Any:
        return load_model(model_folder, quantize=base_bits).model

    fused, dtype, reason = _make(adapter, model_folder, load, dtype)
    config = _fused_config(model_folder, dtype)
    if bits is not None:
        fused, config = _quantise(fused, config, bits, read_json(model_folder / "config.json"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            fresh = Path(place) / "model"
            _write(fused, config, model_folder, fresh)
            _write_card(adapter, model_folder, bits, fresh)
            del fused
            kept = tuple(survival(load(), load_model(fresh).model, adapter, model_folder))
            fresh.rename(out)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"Cannot write the model to {out}: {error}.") from error
    return Fused(out, dtype, bits, reason, kept)


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of a fused model, computed on demand."""

    shape: tuple[int, ...]
    make: Callable[[], mx.array]
    """Computes the tensor in float32, with the adapter merged in."""


def dense_tensors(model: Any) -> dict[str, DenseTensor]:
    """Map names in a dense model without adapters to the tensors of a model with adapters."""
    adapted = dict(adapted_layers(model))
    found: dict[str, DenseTensor] = {}
    for path, module in model.named_modules():
        if path in adapted or path.rpartition(".")[0] in adapted:
            continue
        found |= _tensors_of(path, module, None)
    for path, layer in adapted.items():
        found |= _tensors_of(path, layer.linear, layer)
    return found


def _tensors_of(path: str, module: Any, layer: Any) -> dict[str, DenseTensor]:
    """Return the tensors of one module; layer: the LoRA layer whose update its weight includes."""

    def weight() -> mx.array:
        return _weight(module) if layer is None else _weight(module) + _update(layer)

    def other(name: str) -> mx.array:
        return module[name].astype(mx.float32)

    found = {}
    for name, array in module.items():
        if not isinstance(array, mx.array) or name.startswith("_"):
            continue
        shape = tuple(array.shape)
        if "scales" in module and name in ("scales", "biases", "global_scale"):
            continue
        if "scales" in module and name == "weight":
            shape = (*shape[:-1], module.scales.shape[-1] * module.group_size)
        make = weight if name == "weight" else partial(other, name)
        found[f"{path}.{name}"] = DenseTensor(shape, make)
    return found


def survival(
    base: Any, fused: Any, adapter: Adapter, source: object = None
) -> Iterator[LayerUpdate]:
    """Measure how much of each layer's update is in a fused model; zero updates are skipped.

    base, fused: models without adapters; the adapter is attached to `base`.
    """
    layers = dict(fused.named_modules())
    for name, layer in adapted_layers(attached(base, adapter, source)):
        weight, update = _weight(layer.linear), _update(layer)
        change = _weight(layers[name]) - weight
        size, length = _norm(update), _norm(weight)
        if size > 0:
            product = _number(mx.sum(change * update))
            cosine = product / max(size * _norm(change), 1e-38)
            error = _norm(change - update) / size
            relative = size / length if length else math.inf
            yield LayerUpdate(name, relative, error, cosine, product / size**2)


def _make(
    adapter: Adapter, folder: Path, load: Callable[[], Any], wish: str | None
) -> tuple[Any, str, str]:
    """Return the fused model, its number format, and the reason for it.

    Raises: ConfigError if the values do not fit the requested format.
    """
    model = attached(load(), adapter, folder)
    dtype, reason = _choose_dtype(model, wish)
    fused = _fuse(model, DTYPES[dtype])
    name = _overflow(fused)
    if name is not None and wish is None and dtype == "float16":
        reason = f"{name} has numbers beyond {MOST_FLOAT16:g}, the float16 maximum"
        dtype, fused = "float32", _fuse(attached(load(), adapter, folder), mx.float32)
        name = _overflow(fused)
    if name is not None:
        raise ConfigError(
            f"{name} of the fused model is not finite as {dtype}. "
            + ("Use --dtype float32." if dtype == "float16" else "The model or adapter is broken.")
        )
    return fused, dtype, reason


def attached(model: Any, adapter: Adapter, source: object) -> Any:
    """Attach the adapter to the model and return it."""
    layers = adapter.layers_of(len(model.layers))
    attach(model, rank=adapter.rank, scale=adapter.scale, seed=0, layers=layers, keys=adapter.keys)
    fill(model, adapter.weights, source)
    return model


def _weight(module: Any) -> mx.array:
    """Compute a layer's float32 weight as a new array, to be freed after use."""
    return weight_of(module, mx.float32)


def _update(layer: LoRALayer) -> mx.array:
    """Return the adapter's update to the weight, (outputs, inputs), or that for each expert."""
    a, b = layer.factors
    return layer.scale * (b @ a)


def _norm(array: mx.array) -> float:
    return _number(mx.sqrt(mx.sum(mx.square(array))))


def _number(array: mx.array) -> float:
    value: Any = array.item()
    return value


def _choose_dtype(model: Any, wish: str | None) -> tuple[str, str]:
    """Choose the number format of a model with adapters, and give the reason."""
    if wish is not None:
        return wish, "as requested"
    layers = [layer for _, layer in adapted_layers(model)]
    sizes = [_norm(_update(m)) / max(_norm(_weight(m.linear)), 1e-38) for m in layers]
    middle = median(sizes)
    if 0 < middle < SMALL_UPDATE:
        return "float32", f"the update is {middle:.2g} of the weights, too small for float16"
    return "float16", f"the update is {middle:.2g} of the weights"


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two middle values."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _fuse(model: Any, dtype: mx.Dtype) -> Any:
    """Merge adapters and dequantise everything to `dtype`, one layer at a time."""
    below = [layer.linear for _, layer in adapted_layers(model)]
    waiting = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, LoRALayer)
        or ("scales" in module and not any(module is linear for linear in below))
    ]
    del below
    while waiting:
        path, module = waiting.pop()
        adapted = isinstance(module, LoRALayer)
        base = module.linear if adapted else module
        weight = _weight(base) + _update(module) if adapted else _weight(base)
        dense = dense_layer(base, weight.astype(dtype))
        mx.eval(dense.weight)
        model.update_modules(tree_unflatten([(path, dense)]))
    castable = getattr(model, "cast_predicate", lambda _: True)
    parameters: Any = tree_flatten(model.parameters())
    while parameters:  # each float32 array is freed as soon as it is cast
        name, array = parameters.pop()
        if castable(name) and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
            model.update(tree_unflatten([(name, array)]))
        mx.eval(array)
    return model


def _overflow(model: Any) -> str | None:
    """Return the name of a tensor that is not finite, or None."""
    parameters: Any = tree_flatten(model.parameters())
    return next((name for name, x in parameters if not mx.isfinite(x).all().item()), None)


def _fused_config(model_folder: Path, dtype: str) -> dict[str, Any]:
    config = read_json(model_folder / "config.json")
    config |= rope_settings(config)
    for key in ("quantization", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config


def _quantise(
    model: nn.Module, config: dict[str, Any], bits: int, original: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Quantise affinely, with the base's group size if it has one."""
    from mlx_lm.utils import quantize_model

    group_size = (original.get("quantization") or {}).get("group_size", 64)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints bits per weight
        return quantize_model(model, config, group_size, bits)


def _write(model: Any, config: dict[str, Any], model_folder: Path, folder: Path) -> None:
    from mlx_lm.utils import save_model

    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in TOKENIZER_FILES:
        for path in sorted(model_folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_card(adapter: Adapter, model_folder: Path, bits: int | None, folder: Path) -> None:
    """Write a model card that describes the model and reveals nothing about this machine."""
    card = front_matter(model_folder)
    about: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "localrl", "reinforcement-learning"],
    }
    if adapter.base_id is not None:
        about["base_model"] = adapter.base_id
        about["base_model_relation"] = "quantized" if bits else "finetune"
    if isinstance(card.get("license"), str):
        about["license"] = card["license"]
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items())
    of = f" of {adapter.base_id}" if adapter.base_id is not None else ""
    text = (
        f"---\n{head}\n---\n\n# Fused model\n\nMade with localrl: a LoRA adapter{of} of rank "
        f"{adapter.rank} and scale {adapter.scale:g}, added to the weights.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
