"""Model families, and what their caches hold, as mlx-lm reads them from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FULL, NONE = 0, -1
"""Cache kinds of a layer: all tokens, or no keys and values; positive: a window of that size."""


@dataclass(frozen=True)
class Family:
    """The differences between a family and Llama."""

    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings used if config.json does not have them."""
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that override config.json, because mlx-lm does not read them for this family."""
    norms: int = 2
    """Number of norms over the hidden state in a block."""
    head_norms: str = ""
    """Norms of queries and keys: over each "head", or over "all" heads together."""
    fused: tuple[str, ...] = ()
    """Matrices that are fused into one: "qkv_proj", "gate_up_proj"."""
    out: str = "o_proj"
    feed_forward: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")
    mixer: Literal["", "conv", "linear_attn", "mamba"] = ""
    """mlx-lm's name of the layer in blocks without keys and values: a short convolution, a gated
    delta net, or Mamba 2."""
    output_gate: bool = False
    """True if attention has a gate as wide as its queries, which `q_proj` computes as well."""
    experts: tuple[str, str] = ("mlp.gate", "mlp.switch_mlp")
    """Paths of the router and of the stacked experts."""
    eight_bits: tuple[str, ...] = ()
    """Matrices that mlx-lm quantises to 8 bits, whatever the others have."""
    shared: tuple[str, ...] = tuple(f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down"))
    """Paths of the experts that every token uses; two of them if the first is fused."""
    shared_gate: str = ""
    """Path of the matrix that weighs them."""
    per_layer: bool = False
    """True for Gemma 4, whose layers differ in size: see `blocks`."""
    known: bool = True
    """False for the fallback, which reads an unknown family as Llama."""


_PLAIN = {"attention_bias": False, "mlp_bias": False}
_FULL = {"layer_types": None, "sliding_window": None}
_WIDTH = {"head_dim": None}  # derived from the model's width
_TIED = {"tie_word_embeddings": True}
_GEMMA3 = {
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    # mlx-lm looks for a separate head in the weight files; no published ones have it.
    "tie_word_embeddings": True,
}

_QWEN35 = Family(
    {
        "linear_num_value_heads": 64,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 192,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    },
    {**_FULL, "mlp_bias": False, "mlp_only_layers": None, "decoder_sparse_step": None},
    head_norms="head",
    mixer="linear_attn",
    output_gate=True,
    eight_bits=("mlp.gate", "mlp.shared_expert_gate"),
    shared=tuple(f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")),
    shared_gate="mlp.shared_expert_gate",
)
_GEMMA4 = Family(
    {
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 20,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
        "use_double_wide_mlp": True,
        **_TIED,
    },
    _PLAIN,
    norms=4,
    head_norms="head",
    experts=("router.proj", "experts.switch_glu"),
    eight_bits=("router.proj",),
    per_layer=True,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(_TIED, {"sliding_window_pattern": None}),
    "smollm3": Family(_TIED, _FULL),
    "granite": Family(_TIED, {**_FULL, **_WIDTH}),
    "qwen2": Family(
        _TIED, {**_PLAIN, **_FULL, **_WIDTH, "attention_bias": True, "out_bias": False}
    ),
    "qwen3": Family(fixed={**_PLAIN, **_FULL}, head_norms="head"),
    "qwen3_moe": Family(fixed={**_PLAIN, **_FULL}, head_norms="head", eight_bits=("mlp.gate",)),
    "gemma2": Family(fixed={**_PLAIN, **_FULL, **_TIED}, norms=4),
    "gemma3_text": Family(_GEMMA3, {**_PLAIN, "layer_types": None}, norms=4, head_norms="head"),
    "gemma3": Family(
        {**_GEMMA3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
        {**_PLAIN, "layer_types": None},
        norms=4,
        head_norms="head",
    ),
    "phi3": Family(fixed={**_PLAIN, **_FULL, **_WIDTH}, fused=("qkv_proj", "gate_up_proj")),
    "glm4": Family(
        fixed={**_FULL, "mlp_bias": False, "out_bias": False, "tie_word_embeddings": False},
        norms=4,
        fused=("gate_up_proj",),
    ),
    "olmo2": Family(_TIED, _FULL, head_norms="all"),
    "olmo3": Family(fixed={"mlp_bias": False, "sliding_window_pattern": 4}, head_norms="all"),
    "lfm2": Family(
        {"conv_L_cache": 3, "block_multiple_of": 256},
        {**_PLAIN, **_WIDTH, **_TIED},
        head_norms="head",
        out="out_proj",
        feed_forward=("feed_forward", "w1", "w3", "w2"),
        mixer="conv",
    ),
    "qwen3_5": _QWEN35,
    "qwen3_5_moe": _QWEN35,
    "gemma4_text": _GEMMA4,
    "gemma4": _GEMMA4,
    "granitemoehybrid": Family(
        _TIED,
        {"sliding_window": None, **_WIDTH},
        mixer="mamba",
        experts=("block_sparse_moe.router.layer", "block_sparse_moe.switch_mlp"),
        eight_bits=("block_sparse_moe.router.layer",),
        shared=("shared_mlp.input_linear", "shared_mlp.output_linear"),
    ),
}
"""Families whose blocks are known matrix by matrix."""

SAME = {
    "mistral": "llama",
    "iquestcoder": "llama",
    "xverse": "llama",
    "qwen3_vl_text": "qwen3",
    "gemma4_unified": "gemma4",
}
"""Families that are built like another one, by name."""

OTHER = Family(known=False)


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json; an unknown one is read as if it were Llama."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        name = str(part.get("model_type"))
        if SAME.get(name, name) in FAMILIES:
            return FAMILIES[SAME.get(name, name)]
    return OTHER


def kinds(text: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """Cache kind of each block: FULL, NONE, or the size of its sliding window in tokens."""
    layers, window = text["num_hidden_layers"], text.get("sliding_window")
    types = text.get("layer_types")
    if family.mixer == "conv" and text.get("full_attn_idxs") is not None:
        full = set(text["full_attn_idxs"])
        return tuple(FULL if i in full else NONE for i in range(layers))
    if family.mixer == "linear_attn":
        every = text["full_attention_interval"]
        return tuple(NONE if (i + 1) % every else FULL for i in range(layers))
    if types is None and window and (pattern := text.get("sliding_window_pattern")):
        return tuple(FULL if i % pattern == pattern - 1 else window for i in range(layers))
    if types is None:
        return (FULL,) * layers
    other = {"attention": FULL, "full_attention": FULL, "sliding_attention": window or FULL}
    return tuple(other.get(kind, NONE) for kind in types)


def state_numbers(text: Mapping[str, Any], windows: tuple[int, ...]) -> tuple[int, int]:
    """Sizes of a row's states, summed over all blocks without keys and values.

    Returns: the last inputs of convolutions, and the matrices of recurrent layers.
    """
    tail = matrices = 0
    if "conv_L_cache" in text:
        tail = (text["conv_L_cache"] - 1) * text["hidden_size"]
    elif "linear_num_value_heads" in text:
        tail = (text.get("linear_conv_kernel_dim", 4) - 1) * mixed_width(text)
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        matrices = values * text["linear_key_head_dim"]
    elif text.get("mamba_n_heads"):
        tail = (text["mamba_d_conv"] - 1) * mixed_width(text)
        matrices = text["mamba_n_heads"] * text["mamba_d_head"] * text["mamba_d_state"]
    count = windows.count(NONE)
    return tail * count, matrices * count


def mixed_width(text: Mapping[str, Any]) -> int:
    """Number of channels of a recurrent layer's convolution: its queries, keys and values."""
    if "linear_num_value_heads" in text:
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        return 2 * keys + text["linear_num_value_heads"] * text["linear_value_head_dim"]
    inner = text["mamba_n_heads"] * text["mamba_d_head"]
    return inner + 2 * text["mamba_n_groups"] * text["mamba_d_state"]
