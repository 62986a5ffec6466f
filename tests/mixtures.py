"""Tiny mixtures of experts of each family, and the paths of their experts in a block."""

from __future__ import annotations

from typing import Any

import tiny

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": tiny.FAMILIES["qwen3_moe"],
    "qwen3_5_moe": tiny.FAMILIES["qwen3_5_moe"],
    "gemma4_text": {
        **tiny.FAMILIES["gemma4_text"],
        **EXPERTS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "granitemoehybrid": {
        **tiny.FAMILIES["granitemoehybrid"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 96,
    },
}
PLACES = {
    "qwen3_moe": "mlp.switch_mlp",
    "qwen3_5_moe": "mlp.switch_mlp",
    "gemma4_text": "experts.switch_glu",
    "granitemoehybrid": "block_sparse_moe.switch_mlp",
}


def expert_paths(family: str) -> tuple[str, ...]:
    """Paths of the three stacked matrices within a block."""
    return tuple(f"{PLACES[family]}.{name}_proj" for name in ("gate", "up", "down"))
