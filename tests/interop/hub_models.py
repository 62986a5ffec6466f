"""Tiny random models in the form in which transformers saves them and the Hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

PLAIN: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "tie_word_embeddings": True,
}
ROPE = {"rope_theta": 10000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
DEEP_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
QWEN3_5 = {
    **PLAIN,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
GEMMA3 = {
    **PLAIN,
    **ROPE,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
GEMMA4 = {
    **PLAIN,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 64,
    "global_head_dim": 32,
    "sliding_window": 8,
    "final_logit_softcapping": 3.0,
}
GRANITE = {
    **PLAIN,
    **ROPE,
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 6.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 0.5,
    "position_embedding_type": "rope",
}
LFM2 = {**PLAIN, **ROPE, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
MODELS: dict[str, dict[str, Any]] = {
    "lfm2": {
        **LFM2,
        "block_dim": 64,
        "norm_eps": 1e-6,
        "conv_bias": False,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {**LFM2, "num_dense_layers": 1, **EXPERTS},
    "qwen3_5": {"text_config": QWEN3_5, "vision_config": DEEP_VISION, "tie_word_embeddings": True},
    "qwen3_5_moe": {
        "text_config": {**QWEN3_5, "shared_expert_intermediate_size": 32, **EXPERTS},
        "vision_config": DEEP_VISION,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid": {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    "granitemoehybrid, experts": {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": GEMMA4,
    "gemma4": {
        "vocab_size": 64,
        "text_config": GEMMA4,
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
        "audio_config": None,
    },
    "gemma3_text": GEMMA3,
    "gemma3": {
        "vocab_size": 64,
        "text_config": GEMMA3,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "smollm3": {**PLAIN, **ROPE, "num_hidden_layers": 4},
    "qwen2_moe": {
        **PLAIN,
        **ROPE,
        **EXPERTS,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        **PLAIN,
        **ROPE,
        **EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "mixtral": {**PLAIN, **ROPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**PLAIN, **ROPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_vl": {
        "text_config": {**PLAIN, **ROPE},
        "vision_config": {**DEEP_VISION, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
    },
    "mistral3": {
        "text_config": {**PLAIN, **ROPE, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
    },
}
"""Settings by model type; what follows a comma is for people."""


def make_hub_model(folder: Path, name: str) -> Path:
    """Save a random model by transformers, with the settings as published ones have them.

    transformers 5 renames some settings when it saves, and mlx-lm reads the published names.
    """
    torch.manual_seed(0)
    model_type, settings = name.partition(",")[0], MODELS[name]
    config = AutoConfig.for_model(model_type, **settings)
    opens = AutoModelForImageTextToText if "vision_config" in settings else AutoModelForCausalLM
    model = opens.from_config(config).float()
    for parameter in model.parameters():
        size = 0.1 if parameter.ndim == 1 else 0.08  # norms and biases as well
        parameter.data.add_(size * torch.randn_like(parameter))
    # Its experts are stacked in the published files, which the original format would split.
    model.save_pretrained(folder, save_original_format=model_type != "qwen3_5_moe")
    path = folder / "config.json"
    path.write_text(json.dumps(_published(json.loads(path.read_text()), settings)))
    tiny._write_tokenizer(folder, tiny.TEMPLATE, ())
    return folder


def open_hub_model(folder: Path) -> Any:
    """Open it as AutoModelForCausalLM does, or with its vision if it is opened with that alone."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except ValueError:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def _published(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = {**saved, **given}
    if "rope_theta" in given:
        merged.pop("rope_parameters", None)
    for name, value in given.items():
        if name.endswith("_config") and isinstance(value, dict):
            merged[name] = _published(saved[name], value)
    return merged
