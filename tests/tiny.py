"""Tiny real models for tests: random weights, a character tokenizer, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localrl.backend import mx, nn, tree_flatten

CHARACTERS = " 0123456789abcdefghijklmnopqrstuvwxyz+-=;?#"
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
"""Characters of plain English, for a vocabulary of 128."""
SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 3,
}


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    # The fourth layer has no rotary positions.
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    # Windows of 8 tokens: prompts and completions of the tests are longer.
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "lfm2": {
        "model_type": "lfm2",
        "num_hidden_layers": 3,
        "norm_eps": 1e-6,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    # Three gated delta nets before each layer of attention.
    "qwen3_5": {
        "model_type": "qwen3_5",
        "num_hidden_layers": 4,
        "text_config": {
            "model_type": "qwen3_5_text",
            **{name: value for name, value in CONFIG.items() if name != "model_type"},
            "num_hidden_layers": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
        },
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "num_hidden_layers": 4,
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            **{name: value for name, value in CONFIG.items() if name != "model_type"},
            "num_hidden_layers": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    },
    # Capped logits, embeddings per layer, and keys and values shared by the last layers.
    "gemma4_text": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 64,
        "global_head_dim": 32,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
        "rope_parameters": None,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "attention_bias": False,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "position_embedding_type": "rope",
        "normalization_function": "rmsnorm",
    },
}
"""What differs from CONFIG: full attention, experts, sliding windows, and hybrids with convolutions
or recurrent states."""
UNPLANNED: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "model_type": "nemotron_h",
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M*-M",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "time_step_limit": [0.0, 100.0],
        "layer_norm_epsilon": 1e-5,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "attention_bias": False,
        "mlp_hidden_act": "relu2",
    },
}
"""The same of a family that trains, of which the memory plan does not know the sizes."""


def make_folder(
    folder: Path,
    *,
    seed: int = 0,
    bits: int | None = 4,
    template: str = TEMPLATE,
    extra: Sequence[str] = (),
    special: Sequence[str] = SPECIAL,
    characters: str = CHARACTERS,
    **changes: Any,
) -> Path:
    """A model folder as mlx-lm and Hugging Face write them, quantised unless `bits` is None.

    Its tokenizer knows the special tokens, of which the last ends a completion, the characters and
    `extra`, further tokens of one character or more.
    """
    from mlx_lm.utils import _get_classes

    config = {**CONFIG, **changes}
    mx.random.seed(seed)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, template, extra, special, characters)
    return folder


def make_cached(folder: Path, home: Path, name: str, commit: str = "a" * 40) -> Path:
    """The folder as the Hub's client keeps it below HF_HOME: blobs, and a snapshot of links."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot, blobs = place / "snapshots" / commit, place / "blobs"
    for made in (snapshot, blobs, place / "refs"):
        made.mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = f"{number:040x}"
        (blobs / blob).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob)
    return snapshot


def _write_tokenizer(
    folder: Path,
    template: str,
    extra: Sequence[str],
    special: Sequence[str] = SPECIAL,
    characters: str = CHARACTERS,
) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*special, *characters, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([token for token in extra if len(token) > 1])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[-1],
        "pad_token": special[0],
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_tiny_policy(
    folder: Path, *, rank: int = 4, seed: int = 0, trained: bool = True, **changes: Any
) -> Any:
    """A policy on a tiny model, with adapters that do something unless `trained` is False."""
    from localrl.engines.open import make_policy
    from localrl.policy.model import load_model

    loaded = load_model(make_folder(folder, **changes))
    policy = make_policy(loaded, rank=rank, scale=2.0, seed=seed, for_cpu=True, dense=True)
    if trained:
        stir(policy.model, seed)
    return policy


def stir(model: nn.Module, seed: int, size: float = 0.05) -> None:
    """Give every adapter a small random second half, so that it changes the model."""
    draws = np.random.default_rng(seed)
    weights = [
        (name, mx.array(draws.normal(0, size, array.shape).astype(np.float32)))
        for name, array in tree_flatten(model.trainable_parameters())
        if name.endswith("lora_b")
    ]
    model.load_weights(weights, strict=False)
