"""Conversion of adapters to and from PEFT: Hugging Face module names, matrices transposed.

Only families whose linear layers have the same paths and weights in mlx-lm and transformers are
written; in all of them a layer's last name component identifies one path of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.errors import CheckpointError, ConfigError

FAMILIES = frozenset(
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
    ]
)
"""Model types with identical paths: mlx-lm's `sanitize` renames or splits nothing in them."""

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


def why_not(model_type: str | None, weights: Mapping[str, mx.array]) -> str | None:
    """Return the reason an adapter has no PEFT form; None if it has one."""
    if model_type is None:
        return "the model's family is unknown"
    if any(array.ndim == 3 for array in weights.values()):
        return "it adapts stacked experts, which transformers keeps in other matrices"
    if model_type not in FAMILIES:
        return f"{model_type} has not been checked for the same layer names as in transformers"
    other = [name for name in weights if not name.startswith("model.layers.")]
    return f"{other[0]} is not in the model's blocks" if other else None


def to_peft(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Convert to PEFT's tensors: lora_A (rank, inputs) and lora_B (outputs, rank)."""
    return {
        f"{_PREFIX}{name[:-1]}{name[-1].upper()}.weight": mx.contiguous(array.T)
        for name, array in weights.items()
    }


def config(
    weights: Mapping[str, mx.array], rank: int, scale: float, base_id: str | None
) -> dict[str, Any]:
    """Return PEFT's keys of adapter_config.json; the base model's name only if it is known."""
    alpha = scale * rank
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        # Some readers accept only whole numbers.
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": sorted({key.rpartition(".")[2] for key in keys(weights)}),
    }
    adapted = sorted(set(blocks(weights)))
    if adapted[0] > 0:  # only the last blocks
        found["layers_to_transform"] = adapted
    if base_id is not None:
        found["base_model_name_or_path"] = base_id
    return found


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


def keys(weights: Mapping[str, mx.array]) -> list[str]:
    """List the paths of the adapted layers inside a block."""
    return list(dict.fromkeys(_place(name)[1] for name in weights))


def blocks(weights: Mapping[str, mx.array]) -> list[int]:
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
