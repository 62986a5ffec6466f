"""Conversion of a GGUF file to mlx-lm's layout: planned from its header, then written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.gguf.families import (
    ROPE_FACTORS,
    GGUFFamily,
    is_norm,
    row_heads,
    tensor_names,
    to_halves,
    to_pairs,
)
from localrl.gguf.reader import GGUF, Tensor, refused
from localrl.gguf.settings import config_of
from localrl.gguf.tensors import GROUP, Converted, bits_of, convert, is_lossless
from localrl.gguf.tokenizer import read_tokenizer

MOST_LICENCE = 200
"""Maximum characters of a licence's name, which is written to a model card."""
SHARD = 1 << 30
"""Approximate bytes of one weight file."""


@dataclass(frozen=True)
class Plan:
    """The conversion of a file, planned from its header alone."""

    family: GGUFFamily
    config: dict[str, Any]
    names: dict[str, str]
    """Map from GGUF names of all converted tensors to mlx-lm names."""
    others: dict[str, Any]
    """Contents of the other JSON files by name."""


def make_plan(file: GGUF, family: GGUFFamily) -> Plan:
    """Plan the conversion of a file.

    Raises: ConfigError if it is not valid as a model of that family.
    """
    config = config_of(file, family)
    names = tensor_names(family, config)
    _check_tensors(file, names, config)
    words = read_tokenizer(file, config["vocab_size"], config["max_position_embeddings"])
    config |= words.ids
    if quantisation := _quantisation(file, names):
        config["quantization"] = config["quantization_config"] = quantisation
    others = {
        "tokenizer.json": words.tokenizer,
        "tokenizer_config.json": words.config,
        "generation_config.json": words.ids,
    }
    return Plan(family, config, names, others)


def _check_tensors(file: GGUF, names: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Check the tensors against the expected names and shapes.

    Raises: ConfigError if tensors are missing, unexpected, or not of the model's sizes.
    """
    missing = sorted(names.keys() - file.tensors.keys())
    if missing:
        raise refused(file.path, f"it lacks {len(missing)} tensors: {_some(missing)}")
    extra = sorted(file.tensors.keys() - names.keys() - {ROPE_FACTORS})
    if extra:
        raise refused(file.path, f"{len(extra)} of its tensors are unexpected: {_some(extra)}")
    for name, theirs in names.items():
        wanted = _shape(theirs, config)
        if file.tensors[name].shape != wanted:
            raise refused(
                file.path,
                f"its {name} is {file.tensors[name].shape}, but its settings require {wanted}",
            )


def _some(names: list[str]) -> str:
    return ", ".join(f"{name!r:.60}" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _shape(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a tensor by its mlx-lm name."""
    width, size, inner = (config[n] for n in ("hidden_size", "head_dim", "intermediate_size"))
    queries, keys = (size * config[n] for n in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "embed_tokens": (config["vocab_size"], width),
        "lm_head": (config["vocab_size"], width),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
        "q_norm": (size,),
        "k_norm": (size,),
    }
    part, end = name.split(".")[-2:]
    found = shapes.get(part, (width,))
    return found[:1] if end == "bias" else found


def _quantisation(file: GGUF, names: Mapping[str, str]) -> dict[str, Any]:
    """Return `quantization` for config.json: the most common bits, and all exceptions."""
    bits = {
        theirs.removesuffix(".weight"): bits_of(file.tensors[ours].type)
        for ours, theirs in names.items()
        if len(file.tensors[ours].shape) == 2
    }
    counted = Counter(number for number in bits.values() if number)
    if not counted:
        return {}
    common = counted.most_common(1)[0][0]
    settings: dict[str, Any] = {"group_size": GROUP, "bits": common}
    for path, number in bits.items():
        if number != common:
            settings[path] = {"group_size": GROUP, "bits": number} if number else False
    return settings


def fill(file: GGUF, plan: Plan, folder: Path) -> str:
    """Write all files of a folder; return a description of what was rounded."""
    rounding = _Rounding()
    small = _float_type(file, plan)
    shards = list(_shards(file, plan.names))
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
        arrays: dict[str, mx.array] = {}
        for ours in shard:
            arrays |= _arrays(file, plan, ours, small, rounding)
        mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays, {"format": "mlx"})
    config = {**plan.config, "torch_dtype": _NAMES[small]}
    for name, value in {"config.json": config, **plan.others}.items():
        write_json(folder / name, value)
    licence = file.metadata.get("general.license")
    if isinstance(licence, str) and len(licence) <= MOST_LICENCE:
        card = f"---\nlicense: {json.dumps(licence)}\n---\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
    return rounding.text()


_NAMES: dict[Any, str] = {
    mx.float16: "float16",
    mx.bfloat16: "bfloat16",
    mx.float32: "float32",
}


def _shards(file: GGUF, names: Mapping[str, str]) -> Iterator[list[str]]:
    """Group GGUF names into shards of about SHARD bytes."""
    shard, size = [], 0
    for name in names:
        if shard and size + file.tensors[name].nbytes > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += file.tensors[name].nbytes
    yield shard


def _arrays(
    file: GGUF, plan: Plan, name: str, small: Any, rounding: _Rounding
) -> dict[str, mx.array]:
    """Convert a tensor to mlx-lm's names, row order and number format."""
    tensor = file.tensors[name]
    found = convert(file, tensor)
    rounding.add(tensor, found)
    base = plan.names[name].rsplit(".", 1)[0]
    if len(tensor.shape) == 1:
        end = plan.names[name].rsplit(".", 1)[1]
        return {f"{base}.{end}": _vector(plan, name, found.arrays["weight"]).astype(small)}
    heads = row_heads(plan.family, name, plan.config)
    arrays = {part: to_halves(a, heads) if heads else a for part, a in found.arrays.items()}
    mx.eval(arrays)
    return {f"{base}.{part}": array for part, array in arrays.items()}


def _vector(plan: Plan, name: str, values: mx.array) -> mx.array:
    """Convert a norm or bias to mlx-lm's form, in float32."""
    values = values.astype(mx.float32)
    if plan.family.norms_plus_one and is_norm(name):
        return values - 1
    heads = row_heads(plan.family, name, plan.config)
    return to_halves(values, heads) if heads else values


def _vector_back(plan: Plan, name: str, values: mx.array) -> mx.array:
    """Invert `_vector`."""
    if plan.family.norms_plus_one and is_norm(name):
        return values + 1
    heads = row_heads(plan.family, name, plan.config)
    return to_pairs(values, heads) if heads else values


def _float_type(file: GGUF, plan: Plan) -> Any:
    """Choose the dtype of norms and biases: 16 bits if that changes none of them, else float32.

    llama.cpp always stores them in float32. Keeping that would make MLX compute all of a model's
    activations in float32.
    """
    kinds = {file.tensors[name].type.name for name in plan.names if _is_matrix(file, name)}
    if "F32" in kinds or (plan.family.overflows and "BF16" not in kinds):
        return mx.float32
    small = mx.bfloat16 if "BF16" in kinds else mx.float16
    for name in (name for name in plan.names if not _is_matrix(file, name)):
        stored = convert(file, file.tensors[name]).arrays["weight"].astype(mx.float32)
        values = _vector(plan, name, stored).astype(small).astype(mx.float32)
        if not mx.array_equal(_vector_back(plan, name, values), stored).item():
            return mx.float32
    return small


def _is_matrix(file: GGUF, name: str) -> bool:
    return len(file.tensors[name].shape) == 2


class _Rounding:
    """Accumulates the error of requantisation."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.error = 0.0
        self.norm = 0.0

    def add(self, tensor: Tensor, found: Converted) -> None:
        """Add the error of a tensor."""
        if is_lossless(tensor.type):
            return
        self.counts[f"{tensor.type.name} to {found.bits} bits"] += 1
        self.error += found.squared_error
        self.norm += found.squared_norm

    def text(self) -> str:
        """Describe the error in one line; empty if nothing changed."""
        if not self.counts:
            return ""
        kinds = ", ".join(f"{count} tensors from {kind}" for kind, count in self.counts.items())
        relative = (self.error / self.norm) ** 0.5 if self.norm else 0.0
        return f"{kinds}; their values changed by {relative:.2%} (relative root mean square)"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; a vocabulary is written without line breaks."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    indent = None if path.name == "tokenizer.json" else 1
    beside.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")
    beside.replace(path)
