"""PEFT's names for an adapter: those of Hugging Face's modules, and its matrices transposed.

Only families whose linear layers have the same paths and the same weights in mlx-lm and in
transformers are written; in all of them a layer's last name stands for one path of a block.
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
"""Model types whose paths are the same. mlx-lm's `sanitize` renames or splits nothing in them."""

_PREFIX = "base_model.model."
_HALVES = {"lora_A": "lora_a", "lora_B": "lora_b"}
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers beside LoRA",
    "rank_pattern": "ranks that differ between layers",
    "alpha_pattern": "scales that differ between layers",
    "layer_replication": "replicated layers",
}


def why_not(model_type: str | None, weights: Mapping[str, mx.array]) -> str | None:
    """Why there is no PEFT form of an adapter; None when there is one."""
    if model_type is None:
        return "the model's family is unknown"
    if model_type not in FAMILIES:
        return f"whether {model_type} names its layers as transformers does has not been checked"
    other = [name for name in weights if not name.startswith("model.layers.")]
    return f"{other[0]} is not in the model's blocks" if other else None


def to_peft(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """PEFT's tensors: lora_A (rank, inputs) and lora_B (outputs, rank)."""
    return {
        f"{_PREFIX}{name[:-1]}{name[-1].upper()}.weight": mx.contiguous(array.T)
        for name, array in weights.items()
    }


def config(
    weights: Mapping[str, mx.array], rank: int, scale: float, base_id: str | None
) -> dict[str, Any]:
    """PEFT's keys of adapter_config.json; without a base model's name when that is unknown."""
    alpha = scale * rank
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        # Some readers take whole numbers only.
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": sorted({key.rpartition(".")[2] for key in keys(weights)}),
    }
    adapted = sorted(set(blocks(weights)))
    if adapted[0] > 0:  # the last ones only
        found["layers_to_transform"] = adapted
    if base_id is not None:
        found["base_model_name_or_path"] = base_id
    return found


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, mx.array], file: Path
) -> dict[str, Any]:
    """The fields of an `Adapter` from PEFT's keys and tensors.

    Raises: ConfigError for a kind of adapter that cannot be used; CheckpointError when r or
    lora_alpha are missing.
    """
    kind = config.get("peft_type")
    refused = [what for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append("biases")
    if kind != "LORA" or refused:
        what = refused[0] if refused else f"peft_type {kind!r}"
        raise ConfigError(f"The adapter in {file.parent} has {what}; only plain LoRA can be used.")
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
    """Paths of the adapted layers inside a block."""
    return list(dict.fromkeys(_place(name)[1] for name in weights))


def blocks(weights: Mapping[str, mx.array]) -> list[int]:
    """The block of each tensor, from 0."""
    return [_place(name)[0] for name in weights]


def _place(name: str) -> tuple[int, str]:
    """Block and path inside it of `<...>.<block>.<path>.lora_a`.

    Raises: ConfigError for a tensor outside the blocks.
    """
    match = re.match(r"[^0-9]*\.(\d+)\.(.+)\.lora_[ab]$", name)
    if match is None:
        raise ConfigError(f"The adapter holds {name}, outside of the blocks; that cannot be used.")
    return int(match[1]), match[2]


def _mlx_name(name: str, file: Path) -> str:
    layer, _, half = name.removesuffix(".weight").rpartition(".")
    if half not in _HALVES or not name.startswith(_PREFIX):
        raise ConfigError(f"{file} holds {name}, which is no adapter of a linear layer.")
    return f"{layer.removeprefix(_PREFIX)}.{_HALVES[half]}"
