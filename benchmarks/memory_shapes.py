"""Shapes of random models, and steps, whose memory `benchmarks/memory.py` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step: sizes of its batches, and the setting they are planned under."""

    group: int
    prompt: int
    """Tokens of each prompt; there are two prompts a step."""
    length: int
    """Tokens of each completion."""
    micro: int = 0
    """Completions in a backward pass; 0: all, or as many as the plan chooses under a limit."""
    checkpoint: bool = False
    limit: str = ""
    """`memory.limit` of MLX alone; the plan's own batches are used under it."""


@dataclass(frozen=True)
class Shape:
    """A model of random weights and its steps."""

    config: dict[str, Any]
    """Its config.json."""
    steps: tuple[Step, ...]
    bits: int = 0
    """Bits of quantised weights, which stay packed; 0: floats."""
    engine: str = "auto"
    """`model.engine`."""
    dtype: str = "auto"
    """`model.dtype`."""


BASE: dict[str, Any] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "head_dim": 32, "tie_word_embeddings": True}  # fmt: skip
WINDOWS = {"sliding_window": 64, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32}
SMALL: dict[str, Any] = {**BASE, "hidden_size": 256, "num_hidden_layers": 8,
    "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 4096}  # fmt: skip
DELTA = {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4}  # fmt: skip
GRANITE = {"model_type": "granitemoehybrid", "attention_bias": False, "embedding_multiplier": 6.0,
    "attention_multiplier": 0.125, "logits_scaling": 4.0, "residual_multiplier": 0.5,
    "mamba_proj_bias": False, "mamba_conv_bias": True, "mamba_d_conv": 4,
    "mamba_n_groups": 1}  # fmt: skip
MAMBA = {"layer_types": ["mamba", "mamba", "mamba", "attention"] * 2, "mamba_n_heads": 8,
    "mamba_d_head": 64, "mamba_d_state": 64}  # fmt: skip
LFM2 = {"model_type": "lfm2", "norm_eps": 1e-6, "conv_bias": False, "conv_L_cache": 3,
    "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False}  # fmt: skip
GEMMA4 = {"model_type": "gemma4_text", "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 4096, "global_head_dim": 128, "sliding_window": 64,
    "sliding_window_pattern": 4, "final_logit_softcapping": 30.0, "pad_token_id": 0}  # fmt: skip


def sized(
    width: int, layers: int, inner: int, heads: int, keys: int, size: int, words: int, **more: Any
) -> dict[str, Any]:
    """Sizes that all families have, by the names of config.json."""
    return {**BASE, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": size,
        "vocab_size": words, **more}  # fmt: skip


def qwen35(sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config.json of Qwen3.5, whose text model is nested."""
    name = "qwen3_5_moe" if "num_experts" in more else "qwen3_5"
    text = {**sizes, **more, "model_type": f"{name}_text"}
    return {"model_type": name, "tie_word_embeddings": sizes["tie_word_embeddings"],
        "text_config": text}  # fmt: skip


LONG = (
    Step(8, 32, 32),
    Step(16, 64, 64),
    Step(8, 128, 128, micro=4),
    Step(8, 128, 256, micro=4, checkpoint=True),
    Step(2, 32, 512),
    Step(4, 64, 1024, micro=1),
)
HYBRID = (
    Step(2, 32, 64),
    Step(8, 64, 64),
    Step(8, 128, 128, micro=4),
    Step(8, 128, 256, micro=4, checkpoint=True),
    Step(2, 256, 256),
    Step(2, 64, 512, micro=1),
)
QUANTISED = (Step(2, 32, 32), Step(4, 64, 64, micro=2))
"""Fewer of them where products are quantised: they take minutes on a CPU."""
GRID = (
    Step(2, 32, 32),
    Step(4, 16, 48),
    Step(8, 32, 32),
    Step(2, 192, 64),
    Step(4, 64, 192, micro=4),
    Step(8, 128, 128, micro=8),
    Step(2, 256, 256, micro=2),
    Step(4, 384, 128, micro=4),
    Step(8, 256, 256, micro=2, checkpoint=True),
    Step(2, 64, 960, micro=1),
    Step(4, 512, 512, micro=4, checkpoint=True),
    Step(8, 896, 128, micro=2),
)
"""Groups of 2, 4 and 8 at 64, 256, 512 and 1,024 tokens."""

FITTED: dict[str, Shape] = {
    "qwen3 1 M, tied": Shape(
        {**sized(128, 4, 384, 4, 2, 32, 1024), "model_type": "qwen3"}, LONG),
    "qwen3 8 M, untied": Shape(
        {**sized(256, 8, 768, 8, 4, 32, 4096, tie_word_embeddings=False), "model_type": "qwen3"},
        LONG),
    "llama 14 M, 4-bit": Shape(
        {**sized(256, 6, 1024, 8, 2, 32, 32000), "model_type": "llama"}, QUANTISED, bits=4),
    "gemma3 31 M, windows": Shape(
        {**sized(256, 6, 1024, 4, 1, 64, 50000, tie_word_embeddings=False), **WINDOWS,
        "model_type": "gemma3_text"}, LONG),
    "qwen3_5 9 M": Shape(qwen35(SMALL, **DELTA), HYBRID),
    "granitemoehybrid 9 M": Shape({**SMALL, **GRANITE, **MAMBA}, HYBRID),
    "lfm2 8 M": Shape(
        {**SMALL, **LFM2, "layer_types": ["conv", "conv", "conv", "full_attention"] * 2,
        "block_dim": 256, "block_ff_dim": 768}, HYBRID),
    "gemma4_text 12 M": Shape({**SMALL, **GEMMA4}, HYBRID),
}  # fmt: skip
"""Shapes that the constants were fitted to."""

OTHERS: dict[str, Shape] = {
    "qwen3 4 M, by MLX": Shape(
        {**sized(320, 4, 640, 4, 2, 64, 3000), "model_type": "qwen3"}, GRID, engine="mlx"),
    "llama 6 M, by MLX": Shape(
        {**sized(192, 10, 512, 6, 6, 32, 6000), "model_type": "llama"}, GRID, engine="mlx"),
    "qwen3_5 11 M, wider": Shape(
        qwen35(sized(384, 4, 1024, 6, 2, 64, 8000), linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=128, linear_value_head_dim=128,
        linear_conv_kernel_dim=4, full_attention_interval=2), GRID),
    "qwen3_5_moe 10 M, 8 experts": Shape(
        qwen35(sized(256, 4, 512, 4, 1, 64, 6000), **DELTA, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=256, shared_expert_intermediate_size=256), GRID),
    "gemma4_text 11 M, wider": Shape(
        {**sized(320, 6, 640, 5, 1, 64, 8000), **GEMMA4, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 8000,
        "global_head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 3}, GRID),
    "lfm2 10 M, wider": Shape(
        {**sized(384, 5, 1024, 6, 3, 64, 3000), **LFM2, "block_dim": 384, "block_ff_dim": 1024,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]}, GRID),
    "granitemoehybrid 14 M, 8 experts": Shape(
        {**sized(256, 6, 256, 4, 2, 64, 6000), **GRANITE, "layer_types": ["mamba", "mamba",
        "attention"] * 2, "mamba_n_heads": 12, "mamba_d_head": 32, "mamba_d_state": 128,
        "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 256}, GRID),
}  # fmt: skip
"""Second shapes of each family, to which nothing was fitted."""

WORDS = {
    "vocab_size_per_layer_input": 262144,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
}
LARGE: dict[str, Shape] = {
    "gemma4_text 137 M": Shape(
        {**sized(256, 4, 512, 4, 1, 64, 262144), **GEMMA4, **WORDS},
        (Step(2, 32, 32), Step(4, 64, 64, micro=4), Step(4, 64, 192, limit="1100MiB"),
        Step(8, 64, 64, limit="1300MiB"))),
    "gemma4_text 137 M, 4-bit": Shape(
        {**sized(256, 4, 512, 4, 1, 64, 262144), **GEMMA4, **WORDS},
        (Step(2, 16, 16), Step(4, 16, 24, limit="360MiB")), bits=4),
    "qwen3 18 M, 4-bit, bfloat16": Shape(
        {**sized(256, 2, 768, 4, 2, 64, 64000), "model_type": "qwen3"},
        (Step(2, 16, 16), Step(4, 16, 48, micro=4)), bits=4, dtype="bf16"),
}  # fmt: skip
"""Large vocabularies: Gemma 4's words in a small model, embeddings per layer included."""

SHAPES = {**FITTED, **OTHERS, **LARGE}
