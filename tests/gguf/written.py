"""Tiny GGUF files, written by llama.cpp's own `gguf` package, and what they should compute.

Names come from that package's tables and rows are moved by an index written out, so that nothing
here shares code with what it checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from transformers.convert_slow_tokenizer import bytes_to_unicode

from localrl.backend import mx, tree_flatten, tree_unflatten

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "qwen2": {**CONFIG, "model_type": "qwen2"},
    "qwen3": {**CONFIG, "model_type": "qwen3", "head_dim": 128},
    "gemma3": {
        **CONFIG,
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "query_pre_attn_scalar": 64,
    },
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "Ġ t", "Ġt he", "1 2")
TOKENS = (
    *SPECIAL,
    *bytes_to_unicode().values(),
    *("".join(merge.split(" ")) for merge in MERGES),
)


@dataclass(frozen=True)
class WrittenGGUF:
    """A file and the model that it holds."""

    path: Path
    model: Any
    """Of mlx-lm, untouched, in float32, with what the file's numbers are."""


def write_model(
    path: Path,
    architecture: str = "llama",
    kind: str | Mapping[str, str] = "F32",
    *,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    template: str = TEMPLATE,
) -> WrittenGGUF:
    """Write a model with random weights; matrices in the type `kind`, vectors in float32.

    kind: also by the part of the model, those not named in Q4_0.
    config: what differs from CONFIGS; extra: further metadata; tensors: further float32 tensors.
    """
    settings = {**CONFIGS[architecture], **(config or {})}
    model = new_model(settings)
    extra = dict(extra or {})
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], settings["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, extra.pop("general.architecture", architecture))
    if "tokenizer.ggml.model" not in extra:
        write_tokenizer(writer, "qwen2" if architecture == "qwen2" else "smollm", template)
    for key, value in {**_settings(architecture, settings), **extra}.items():
        _write_value(writer, key, value)
    rng, read = np.random.default_rng(5), []
    for name, array in tree_flatten(model.parameters()):
        values = np.array(array)
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        order = _order(architecture, ours, settings, len(values))
        values = values[order]
        if values.ndim == 1:
            values = values + (architecture == "gemma3")
            writer.add_tensor(ours, values)
        else:
            form = kind if isinstance(kind, str) else kind.get(ours.split(".")[-2], "Q4_0")
            raw, values = pack(values, form, rng)
            writer.add_tensor(ours, raw, raw_dtype=None if form in ("F32", "F16") else Kind[form])
        values = values - (values.ndim == 1 and architecture == "gemma3")
        back = np.empty_like(values)
        back[order] = values
        read.append((name, mx.array(back)))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    model.update(tree_unflatten(read))
    return WrittenGGUF(path, model)


def new_model(settings: Mapping[str, Any]) -> Any:
    """mlx-lm's model of that config.json, with random weights in float32."""
    from mlx_lm.utils import _get_classes

    made, arguments = _get_classes(dict(settings))
    model = made(arguments.from_dict(dict(settings)))
    if settings["model_type"] == "gemma3_text":
        model.sanitize({})  # as loading does: ties the head
    rng = np.random.default_rng(1)
    weights = [
        (name, mx.array(_weight(name, array.shape, rng)))
        for name, array in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def pack(values: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in a type of GGUF, as it stores them, and what they are there (float32).

    The `gguf` package packs no K types: of these blocks are drawn, with scales of a sane size.
    """
    form = Kind[kind]
    if not kind.endswith("_K"):
        raw = gguf.quantize(values, form)
        return raw, np.asarray(gguf.dequantize(raw, form), np.float32).reshape(values.shape)
    block, size = gguf.GGML_QUANT_SIZES[form]
    raw = rng.integers(0, 256, (len(values), values.shape[1] // block * size), np.uint8)
    blocks = raw.reshape(-1, size)
    for place, scale in {"Q4_K": ((0, 3e-4), (2, 2e-3)), "Q5_K": ((0, 1.5e-4), (2, 2e-3))}.get(
        kind, ((208, 3e-5),)
    ):
        halves = (scale * rng.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw, np.asarray(gguf.dequantize(raw, form), np.float32).reshape(values.shape)


def write_tokenizer(writer: gguf.GGUFWriter, pre: str, template: str) -> None:
    """A byte-level vocabulary with four merges and a chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(template)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything to the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if architecture == "gemma3":
        named["attention.sliding_window"] = config["sliding_window"]
    return {f"{architecture}.{key}": value for key, value in named.items()}


def _write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _order(architecture: str, name: str, config: Mapping[str, Any], rows: int) -> np.ndarray:
    """For each row in the file, which row of the model it is."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = name.split(".")[-2]
    if architecture != "llama" or part not in heads:
        return np.arange(rows)
    size = rows // config[heads[part]]
    order = []
    for head in range(config[heads[part]]):
        for pair in range(size // 2):
            order += [head * size + pair, head * size + size // 2 + pair]
    return np.array(order)


def _weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(0, 0.05, shape)
    if name.endswith("norm.weight"):
        values = 1 + values
    # Halves of bfloat16: exact in float16 too, as the norms of real models are.
    return values.astype(np.float16).astype(np.float32)
