"""Conversion of adapters to and from PEFT: Hugging Face module names, matrices transposed.

Most families have the same linear layers in mlx-lm and transformers. In others paths differ, or
transformers joins layers that mlx-lm splits; an adapter of a joined layer is exact with the ranks
of its parts added up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.errors import CheckpointError, ConfigError

SAME = frozenset(
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "olmo3",
        "granite",
        "helium",
        "cohere",
        "cohere2",
        "starcoder2",
        "stablelm",
        "seed_oss",
        "exaone4",
        "hunyuan_v1_dense",
        "glm",
        "glm4",
        "ernie4_5",
        "ministral3",
    ]
)
"""Model types with identical paths, in which a path's last component identifies a layer."""


@dataclass(frozen=True)
class Naming:
    """Differences between mlx-lm's and transformers' paths of the linear layers of a family."""

    prefix: tuple[str, str] = ("", "")
    """The beginning of every path: mlx-lm's, and what transformers has in its place."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Paths inside a block: transformers' by mlx-lm's."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """mlx-lm's paths of equally many outputs, in order, of which transformers has one layer."""
    refused: tuple[str, ...] = ()
    """Last components of layers that PEFT or transformers would leave without their adapter."""


_VISION = ("language_model.model.", "model.language_model.")
_FUSED = ("gate_proj", "up_proj", "down_proj")
"""PEFT takes these, in families that had one layer per expert before transformers 5, for experts,
and puts what it loads elsewhere."""
OTHER: Mapping[str, Naming] = {
    **dict.fromkeys(["lfm2", "gemma4_text", "minicpm3"], Naming()),
    # The language model alone, which is what AutoModelForCausalLM opens.
    "qwen3_5": Naming(("language_model.model.", "model.")),
    "qwen3_5_moe": Naming(("language_model.model.", "model."), refused=("gate",)),
    **dict.fromkeys(["gemma3", "gemma4", "mistral3", "qwen3_vl"], Naming(_VISION)),
    **dict.fromkeys(["qwen3_moe", "qwen3_next", "olmoe"], Naming(refused=_FUSED)),
    "qwen2_moe": Naming(refused=("gate",)),
    "mixtral": Naming(),
    "granitemoe": Naming(refused=("layer",)),
    "granitemoehybrid": Naming(
        renamed={"mlp.down_proj": "shared_mlp.output_linear"},
        joined={"shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj")},
        refused=("layer",),
    ),
    "lfm2_moe": Naming(
        renamed={
            "feed_forward.gate_proj": "feed_forward.w1",
            "feed_forward.up_proj": "feed_forward.w3",
            "feed_forward.down_proj": "feed_forward.w2",
        },
        refused=("gate",),
    ),
    "nemotron_h": Naming(("backbone.", "model."), refused=("out_proj",)),
}
"""Model types whose layers are written with their full paths."""

FAMILIES: Mapping[str, Naming] = {**dict.fromkeys(SAME, Naming()), **OTHER}

_PREFIX = "base_model.model."
_HALVES = {"lora_A": "lora_a", "lora_B": "lora_b"}
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers besides LoRA",
    "rank_pattern": "ranks that differ between layers",
    "alpha_pattern": "scales that differ between layers",
    "layer_replication": "replicated layers",
    "target_parameters": "adapters of parameters, such as stacked experts",
}


@dataclass(frozen=True, eq=False)
class _Layer:
    """An adapter of one of transformers' layers."""

    path: str
    a: mx.array
    """(rank, inputs)."""
    b: mx.array
    """(outputs, rank)."""


def why_not(model_type: str | None, weights: Mapping[str, mx.array]) -> str | None:
    """Return the reason an adapter has no PEFT form; None if it has one."""
    if model_type is None:
        return "the model's family is unknown"
    if any(array.ndim == 3 for array in weights.values()):
        return "it adapts stacked experts, which transformers keeps in other matrices"
    if model_type not in FAMILIES:
        return f"{model_type} has not been checked for the same layer names as in transformers"
    naming = FAMILIES[model_type]
    start = f"{naming.prefix[0] or 'model.'}layers."
    other = [name for name in weights if not name.startswith(start)]
    if other:
        return f"{other[0]} is not in the model's blocks"
    stacked = [name for name, array in weights.items() if array.ndim != 2]
    if stacked:
        return _without(weights, stacked, "is a stack of experts, which has no PEFT form")
    refused = [name for name in weights if name.split(".")[-2] in naming.refused]
    if refused:
        return _without(weights, refused, f"has no adapter by PEFT in {model_type}")
    return None


def _without(weights: Mapping[str, mx.array], names: list[str], why: str) -> str:
    """Return a reason that names a layer, and the setting that leaves such layers out."""
    bad, paths = keys(names), keys(weights)
    rest = ", ".join(f'"{path}"' for path in paths if path not in bad)
    return (
        f"{bad[0]} {why}; an adapter trained with lora.keys = [{rest}] has all of its layers there"
    )


def to_peft(model_type: str, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Convert to PEFT's tensors: lora_A (rank, inputs) and lora_B (outputs, rank)."""
    return {
        f"{_PREFIX}{layer.path}.{half}.weight": mx.contiguous(array)
        for layer in _layers(FAMILIES[model_type], weights)
        for half, array in (("lora_A", layer.a), ("lora_B", layer.b))
    }


def config(
    model_type: str, weights: Mapping[str, mx.array], rank: int, scale: float, base_id: str | None
) -> dict[str, Any]:
    """Return PEFT's keys of adapter_config.json; the base model's name only if it is known."""
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    if model_type in SAME:
        found["target_modules"] = sorted({key.rpartition(".")[2] for key in keys(weights)})
        adapted = sorted(set(blocks(weights)))
        if adapted[0] > 0:  # only the last blocks
            found["layers_to_transform"] = adapted
    else:
        ranks = {x.path: len(x.a) for x in _layers(FAMILIES[model_type], weights)}
        found["target_modules"] = sorted(ranks)
        larger = {path: own for path, own in ranks.items() if own != rank}
        if larger:
            found["rank_pattern"] = larger
            found["alpha_pattern"] = {path: _alpha(scale, own) for path, own in larger.items()}
    if base_id is not None:
        found["base_model_name_or_path"] = base_id
    return found


def _alpha(scale: float, rank: int) -> float:
    """Return lora_alpha, whole where it can be: some readers accept nothing else."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _layers(naming: Naming, weights: Mapping[str, mx.array]) -> Iterator[_Layer]:
    """Yield the adapters under transformers' paths, those of joined layers as one."""
    whole = {part: path for path, parts in naming.joined.items() for part in parts}
    done: set[str] = set()
    for name in weights:
        layer = name.rpartition(".")[0]
        path = _place(name)[1]
        before = naming.prefix[1] + layer.removesuffix(path).removeprefix(naming.prefix[0])
        target = before + whole.get(path, naming.renamed.get(path, path))
        if target in done:
            continue
        done.add(target)
        parts = naming.joined.get(whole.get(path, ""), (path,))
        places = [layer.removesuffix(path) + part for part in parts]
        yield _Layer(target, *_join(places, weights))


def _join(places: list[str], weights: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
    """Return A and B of a layer whose outputs are those of the places, one after the other.

    The rows of A are those of all adapters; B is block-diagonal, zero where there is no adapter.
    """
    there = [place for place in places if f"{place}.lora_a" in weights]
    a = mx.concatenate([weights[f"{place}.lora_a"].T for place in there])
    outputs = weights[f"{there[0]}.lora_b"].shape[1]
    b = mx.zeros((outputs * len(places), len(a)))
    begin = 0
    for place in there:
        part = weights[f"{place}.lora_b"].T  # (outputs, rank)
        first, end = places.index(place) * outputs, begin + part.shape[1]
        b[first : first + outputs, begin:end] = part
        begin = end
    return a, b


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, mx.array], file: Path
) -> dict[str, Any]:
    """Convert PEFT's keys and tensors to the fields of an `Adapter`.

    Raises: ConfigError for an unsupported kind of adapter; CheckpointError if r or lora_alpha is
    missing.
    """
    kind = config.get("peft_type")
    refused = [what for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append("biases")
    if kind != "LORA" or refused:
        what = refused[0] if refused else f"peft_type {kind!r}"
        raise ConfigError(f"The adapter in {file.parent} has {what}; only plain LoRA is supported.")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file.parent / 'adapter_config.json'} lacks r or lora_alpha ({error})."
        ) from None
    weights = {_mlx_name(name, file): array.T for name, array in tensors.items()}
    layers = config.get("layers_to_transform")
    return {
        "weights": weights,
        "rank": rank,
        "scale": alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        "layers": len(set(blocks(weights))) if layers is not None else 0,
        "keys": tuple(keys(weights)),
    }


def keys(weights: Iterable[str]) -> list[str]:
    """List the paths of the adapted layers inside a block."""
    return list(dict.fromkeys(_place(name)[1] for name in weights))


def blocks(weights: Iterable[str]) -> list[int]:
    """Return the block index of each tensor, from 0."""
    return [_place(name)[0] for name in weights]


def _place(name: str) -> tuple[int, str]:
    """Parse the block and the path inside it from `<...>.<block>.<path>.lora_a`.

    Raises: ConfigError for a tensor outside the blocks.
    """
    match = re.match(r"[^0-9]*\.(\d+)\.(.+)\.lora_[ab]$", name)
    if match is None:
        raise ConfigError(
            f"The adapter contains {name}, outside the blocks; that is not supported."
        )
    return int(match[1]), match[2]


def _mlx_name(name: str, file: Path) -> str:
    layer, _, half = name.removesuffix(".weight").rpartition(".")
    if half not in _HALVES or not name.startswith(_PREFIX):
        raise ConfigError(f"{file} contains {name}, which is not an adapter of a linear layer.")
    return f"{layer.removeprefix(_PREFIX)}.{_HALVES[half]}"
