"""The blocks of each model family as mlx-lm builds them from the numbers in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from localrl.memory.layers import BlockShape, Matrix

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
    convolutions: bool = False
    """True if blocks without keys and values hold short convolutions."""
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

FAMILIES: dict[str, Family] = {
    "llama": Family(_TIED, {"sliding_window_pattern": None}),
    "smollm3": Family(_TIED, _FULL),
    "granite": Family(_TIED, {**_FULL, **_WIDTH}),
    "qwen2": Family(
        _TIED, {**_PLAIN, **_FULL, **_WIDTH, "attention_bias": True, "out_bias": False}
    ),
    "qwen3": Family(fixed={**_PLAIN, **_FULL}, head_norms="head"),
    "qwen3_moe": Family(fixed={**_PLAIN, **_FULL}, head_norms="head"),
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
        convolutions=True,
    ),
}
"""Families whose blocks are known matrix by matrix."""

SAME = {
    "mistral": "llama",
    "iquestcoder": "llama",
    "xverse": "llama",
    "qwen3_vl_text": "qwen3",
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
    if family.convolutions and text.get("full_attn_idxs") is not None:
        full = set(text["full_attn_idxs"])
        return tuple(FULL if i in full else NONE for i in range(layers))
    if types is None and window and (pattern := text.get("sliding_window_pattern")):
        return tuple(FULL if i % pattern == pattern - 1 else window for i in range(layers))
    if types is None:
        return (FULL,) * layers
    other = {"full_attention": FULL, "sliding_attention": window or FULL}
    return tuple(other.get(kind, NONE) for kind in types)


def state_numbers(text: Mapping[str, Any], windows: tuple[int, ...]) -> int:
    """Size of a row's recurrent states, summed over all blocks without keys and values."""
    number = 0
    if "conv_L_cache" in text:
        number = (text["conv_L_cache"] - 1) * text["hidden_size"]
    elif "linear_num_value_heads" in text:  # gated delta nets: a matrix per head, a convolution
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        kernel = text.get("linear_conv_kernel_dim", 4)
        number = values * text["linear_key_head_dim"] + (kernel - 1) * (2 * keys + values)
    return number * windows.count(NONE)


def blocks(
    text: Mapping[str, Any], family: Family, windows: tuple[int, ...]
) -> Iterator[BlockShape]:
    """Yield the blocks in order; the counts in `text` are complete and were checked."""
    for index, window in enumerate(windows):
        if window == NONE and family.convolutions:
            mixing, others = _convolution(text)
        else:
            mixing, others = _attention(text, family)
        has_experts = _has_experts(text, index)
        after = _experts(text) if has_experts else _feed_forward(text, family)
        yield BlockShape((*mixing, *after), others + family.norms * text["hidden_size"])


def ends(text: Mapping[str, Any]) -> BlockShape:
    """Return the parts before and after the blocks: the embedding, the last norm, the head."""
    width, vocabulary = text["hidden_size"], text["vocab_size"]
    embedding = Matrix("embed_tokens", width, vocabulary, kind="embedding")
    head = Matrix("lm_head", width, vocabulary, kind="head")
    return BlockShape((embedding,) if text["tie_word_embeddings"] else (embedding, head), width)


def ffn(text: Mapping[str, Any], family: Family) -> int:
    """Inner width of a feed-forward layer, summed over all experts of a token."""
    if not _count_experts(text):
        return _inner(text, family)
    chosen = text.get("num_experts_per_tok") or text.get("num_experts_per_token") or 1
    return chosen * _expert_width(text) + _shared_width(text)


def _attention(text: Mapping[str, Any], family: Family) -> tuple[list[Matrix], int]:
    width, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    bias = bool(text.get("attention_bias"))
    if "qkv_proj" in family.fused:
        matrices = [Matrix("self_attn.qkv_proj", width, queries + 2 * keys, bias)]
    else:
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        matrices = [Matrix(f"self_attn.{name}", width, n, bias) for name, n in outputs.items()]
    out_bias = bool(text.get("out_bias", bias))
    matrices.append(Matrix(f"self_attn.{family.out}", queries, width, out_bias))
    norms = {"": 0, "head": 2 * size, "all": queries + keys}
    return matrices, norms[family.head_norms]


def _convolution(text: Mapping[str, Any]) -> tuple[list[Matrix], int]:
    width, bias = text["hidden_size"], bool(text.get("conv_bias"))
    matrices = [
        Matrix("conv.in_proj", width, 3 * width, bias),
        Matrix("conv.out_proj", width, width, bias),
    ]
    return matrices, width * (text["conv_L_cache"] + bias)


def _feed_forward(text: Mapping[str, Any], family: Family) -> list[Matrix]:
    width, inner = text["hidden_size"], _inner(text, family)
    bias = bool(text.get("mlp_bias"))
    place, gate, up, down = family.feed_forward
    last = Matrix(f"{place}.{down}", inner, width, bias)
    if "gate_up_proj" in family.fused:
        return [Matrix(f"{place}.gate_up_proj", width, 2 * inner, bias), last]
    first = [Matrix(f"{place}.{name}", width, inner, bias) for name in (gate, up)]
    return [*first, last]


def _inner(text: Mapping[str, Any], family: Family) -> int:
    """Inner width of a layer without experts."""
    if not family.convolutions:
        return text["intermediate_size"]
    inner = text.get("block_ff_dim") or text["intermediate_size"]
    if not text.get("block_auto_adjust_ff_dim"):
        return inner
    inner = int(text.get("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
    multiple = text["block_multiple_of"]
    return -(-inner // multiple) * multiple


def _count_experts(text: Mapping[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((text[name] for name in names if text.get(name)), 0)


def _has_experts(text: Mapping[str, Any], index: int) -> bool:
    return (
        _count_experts(text) > 0
        and index not in (text.get("mlp_only_layers") or ())
        and index >= (text.get("first_k_dense_replace") or 0)
        and (index + 1) % (text.get("decoder_sparse_step") or 1) == 0
    )


def _expert_width(text: Mapping[str, Any]) -> int:
    return text.get("moe_intermediate_size") or text["intermediate_size"]


def _shared_width(text: Mapping[str, Any]) -> int:
    """Inner width of the experts that every token uses."""
    count = text.get("n_shared_experts") or 0
    return text.get("shared_expert_intermediate_size") or count * _expert_width(text)


def _experts(text: Mapping[str, Any]) -> list[Matrix]:
    width, inner, shared = text["hidden_size"], _expert_width(text), _shared_width(text)
    experts = _count_experts(text)
    matrices = [Matrix("mlp.gate", width, experts, kind="router")]
    for name, ins, outs in (
        ("gate_proj", width, inner),
        ("up_proj", width, inner),
        ("down_proj", inner, width),
    ):
        path = f"mlp.switch_mlp.{name}"
        matrices.append(Matrix(path, ins, outs, kind="experts", copies=experts))
    if shared:
        matrices += [
            Matrix("mlp.shared_experts.gate_proj", width, shared),
            Matrix("mlp.shared_experts.up_proj", width, shared),
            Matrix("mlp.shared_experts.down_proj", shared, width),
        ]
    return matrices
