"""A model with its adapter added in, as a folder of its own, and how much of the update is in it.

Adding an update to 4-bit weights and packing them again rounds most of it away, so that the fused
model is dense: float16, or float32 where the update is too small for that. What survived is
measured on the files that were written.
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
from localrl.policy.lora import LoRALinear, attach, fill
from localrl.policy.model import load_model
from localrl.policy.rope import rope_settings

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
MOST_FLOAT16 = 65504.0
SMALL_UPDATE = 1e-3
"""Of the size of the weights: below it float16 rounds a fifth of an update away."""
TOKENIZER_FILES = (
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "*.model", "generation_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class LayerUpdate:
    """What became of one layer's update D, where W is the base's weight and F the fused one's."""

    name: str
    size: float
    """|D| / |W|."""
    error: float
    """|(F - W) - D| / |D|."""
    cosine: float
    """Of F - W and D."""
    share: float
    """(F - W) D / |D|^2: 1 where all of D is in, whatever noise is on top; 0 where none is."""


@dataclass(frozen=True)
class Fused:
    """A fused model as it was written."""

    folder: Path
    dtype: str
    bits: int | None
    """None: dense."""
    reason: str
    """Why this number format."""
    layers: tuple[LayerUpdate, ...]
    """Those whose update is not zero."""


def export_fused(
    adapter: Adapter,
    model_folder: Path,
    out: Path,
    *,
    base_bits: int = 0,
    dtype: str | None = None,
    bits: int | None = None,
) -> Fused:
    """Write the model with the adapter added in to the folder `out`, all at once.

    base_bits: to which the run packed the model's weights when it read them; 0: it did not.
    bits: pack the fused weights again, with the loss that this means.

    Raises: ConfigError when `out` holds something, when the adapter does not fit the model or the
    values do not fit into `dtype`; CheckpointError when it cannot be written.
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
        raise CheckpointError(f"The model cannot be written to {out}: {error}.") from error
    return Fused(out, dtype, bits, reason, kept)


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of a fused model, which is computed when it is asked for."""

    shape: tuple[int, ...]
    make: Callable[[], mx.array]
    """In float32, with the adapter added in."""


def dense_tensors(model: Any) -> dict[str, DenseTensor]:
    """All tensors of a model with adapters on it, by their names in a dense model without."""
    adapted = dict(_adapted(model))
    found: dict[str, DenseTensor] = {}
    for path, module in model.named_modules():
        if path in adapted or path.rpartition(".")[0] in adapted:
            continue
        found |= _tensors_of(path, module, None)
    for path, layer in adapted.items():
        found |= _tensors_of(path, layer.linear, layer)
    return found


def _tensors_of(path: str, module: Any, layer: Any) -> dict[str, DenseTensor]:
    """Tensors of one module; layer: with whose update its weight is."""

    def weight() -> mx.array:
        return _weight(module) if layer is None else _weight(module) + _update(layer)

    def other(name: str) -> mx.array:
        return module[name].astype(mx.float32)

    found = {}
    for name, array in module.items():
        if not isinstance(array, mx.array) or name.startswith("_"):
            continue
        shape = tuple(array.shape)
        if "scales" in module and name in ("scales", "biases"):
            continue
        if "scales" in module and name == "weight":
            shape = (*shape[:-1], module.scales.shape[-1] * module.group_size)
        make = weight if name == "weight" else partial(other, name)
        found[f"{path}.{name}"] = DenseTensor(shape, make)
    return found


def survival(
    base: Any, fused: Any, adapter: Adapter, source: object = None
) -> Iterator[LayerUpdate]:
    """What of each layer's update is in a fused model; layers whose update is zero are left out.

    base, fused: models without adapters; `base` gets them.
    """
    layers = dict(fused.named_modules())
    for name, layer in _adapted(attached(base, adapter, source)):
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
    """The fused model, its number format, and why this one.

    Raises: ConfigError when the values do not fit into the one that is wished for.
    """
    model = attached(load(), adapter, folder)
    dtype, reason = _choose_dtype(model, wish)
    fused = _fuse(model, DTYPES[dtype])
    name = _overflow(fused)
    if name is not None and wish is None and dtype == "float16":
        reason = f"{name} holds numbers beyond {MOST_FLOAT16:g}, where float16 ends"
        dtype, fused = "float32", _fuse(attached(load(), adapter, folder), mx.float32)
        name = _overflow(fused)
    if name is not None:
        raise ConfigError(
            f"{name} of the fused model is not finite as {dtype}. "
            + ("Take --dtype float32." if dtype == "float16" else "The model or adapter is broken.")
        )
    return fused, dtype, reason


def attached(model: Any, adapter: Adapter, source: object) -> Any:
    """The model with the adapter on it."""
    layers = adapter.layers_of(len(model.layers))
    attach(model, rank=adapter.rank, scale=adapter.scale, seed=0, layers=layers, keys=adapter.keys)
    fill(model, adapter.weights, source)
    return model


def _adapted(model: Any) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def _weight(module: Any) -> mx.array:
    """A linear layer's weight in float32, made anew, so that it can be forgotten after use."""
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    scales, biases = module.scales, module.get("biases")
    if mx.issubdtype(scales.dtype, mx.floating):  # other modes pack them into bytes
        scales = scales.astype(mx.float32)
        biases = biases.astype(mx.float32) if biases is not None else None
    sizes = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(module.weight, scales, biases, **sizes).astype(mx.float32)


def _update(layer: Any) -> mx.array:
    """(outputs, inputs): what the adapter adds to the weight."""
    return layer.scale * (layer.lora_b.T @ layer.lora_a.T)


def _norm(array: mx.array) -> float:
    return _number(mx.sqrt(mx.sum(mx.square(array))))


def _number(array: mx.array) -> float:
    value: Any = array.item()
    return value


def _choose_dtype(model: Any, wish: str | None) -> tuple[str, str]:
    """The number format of a model with adapters on it, and why."""
    if wish is not None:
        return wish, "as asked for"
    sizes = [_norm(_update(m)) / max(_norm(_weight(m.linear)), 1e-38) for _, m in _adapted(model)]
    middle = median(sizes)
    if 0 < middle < SMALL_UPDATE:
        return "float32", f"the update is {middle:.2g} of the weights, too small for float16"
    return "float16", f"the update is {middle:.2g} of the weights"


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _fuse(model: Any, dtype: mx.Dtype) -> Any:
    """Adapters added in, nothing quantised, all in `dtype`; one layer is computed at a time."""
    from mlx_lm.utils import dequantize_model

    for name, layer in _adapted(model):
        linear = nn.Linear(1, 1, bias="bias" in layer.linear)
        linear.weight = (_weight(layer.linear) + _update(layer)).astype(dtype)
        mx.eval(linear.weight)
        if "bias" in linear:
            linear.bias = layer.linear.bias
        model.update_modules(tree_unflatten([(name, linear)]))
    for module in model.modules():
        if "scales" in module:  # embeddings, heads, experts
            module.set_dtype(mx.float32)
    dequantize_model(model)
    castable = getattr(model, "cast_predicate", lambda _: True)
    parameters: Any = tree_flatten(model.parameters())
    while parameters:  # each float32 array is forgotten as soon as it is cast
        name, array = parameters.pop()
        if castable(name) and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
            model.update(tree_unflatten([(name, array)]))
        mx.eval(array)
    return model


def _overflow(model: Any) -> str | None:
    """The name of a tensor that is not finite."""
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
    """Affine quantisation, in groups as large as the base's where it has some."""
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
    """A model card that says what this is, and nothing of this machine."""
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
