"""The blocks of each model family, matrix by matrix, as mlx-lm builds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from localrl.memory.families import FULL, NONE, Family, mixed_width
from localrl.memory.layers import BlockShape, Matrix


def blocks(
    text: Mapping[str, Any], family: Family, windows: tuple[int, ...]
) -> Iterator[BlockShape]:
    """Yield the blocks in order; the counts in `text` are complete and were checked."""
    for index, window in enumerate(windows):
        if family.per_layer:
            yield _gemma4(text, family, index, window)
            continue
        mixes = window == NONE and family.mixer
        mixing, others = _MIXERS[family.mixer](text) if mixes else _attention(text, family)
        has_experts = _has_experts(text, index)
        after = _experts(text, family) if has_experts else _feed_forward(text, family)
        queries = 0 if mixes else text["num_attention_heads"] * text["head_dim"]
        yield BlockShape(
            (*mixing, *after),
            others + family.norms * text["hidden_size"],
            cached=0 if window == NONE else 2 * text["num_key_value_heads"] * text["head_dim"],
            queries=queries,
            gated=sum(m.outputs for m in mixing[:-1]) if mixes else family.output_gate * queries,
            inner=_chosen_width(text) if has_experts else _inner(text, family),
        )


def ends(text: Mapping[str, Any], family: Family) -> BlockShape:
    """Return the parts before and after the blocks: embeddings, the last norm, the head."""
    width, vocabulary = text["hidden_size"], text["vocab_size"]
    matrices, others = [Matrix("embed_tokens", width, vocabulary, kind="embedding")], width
    if not text["tie_word_embeddings"]:
        matrices.append(Matrix("lm_head", width, vocabulary, kind="head"))
    if family.per_layer and (each := text["hidden_size_per_layer_input"]):
        all_layers, names = each * text["num_hidden_layers"], text["vocab_size_per_layer_input"]
        matrices += [
            Matrix("embed_tokens_per_layer", all_layers, names, kind="embedding"),
            Matrix("per_layer_model_projection", width, all_layers),
        ]
        others += each
    return BlockShape(tuple(matrices), others)


def ffn(text: Mapping[str, Any], family: Family) -> int:
    """Inner width of a feed-forward layer, summed over all experts of a token."""
    if family.per_layer:
        beside = _chosen_width(text) if text.get("enable_moe_block") else 0
        return _inner(text, family) + beside
    return _chosen_width(text) if _count_experts(text) else _inner(text, family)


def _attention(text: Mapping[str, Any], family: Family) -> tuple[list[Matrix], int]:
    width, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    bias = bool(text.get("attention_bias"))
    if "qkv_proj" in family.fused:
        matrices = [Matrix("self_attn.qkv_proj", width, queries + 2 * keys, bias)]
    else:
        first = 2 * queries if family.output_gate else queries
        outputs = {"q_proj": first, "k_proj": keys, "v_proj": keys}
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


def _delta(text: Mapping[str, Any]) -> tuple[list[Matrix], int]:
    """A gated delta net: a convolution of queries, keys and values, two gates per head, a norm."""
    width, heads, mixed = text["hidden_size"], text["linear_num_value_heads"], mixed_width(text)
    values = heads * text["linear_value_head_dim"]
    outputs = {"qkv": mixed, "z": values, "b": heads, "a": heads}
    matrices = [Matrix(f"linear_attn.in_proj_{name}", width, n) for name, n in outputs.items()]
    matrices.append(Matrix("linear_attn.out_proj", values, width))
    others = text["linear_conv_kernel_dim"] * mixed + 2 * heads + text["linear_value_head_dim"]
    return matrices, others


def _mamba(text: Mapping[str, Any]) -> tuple[list[Matrix], int]:
    """Mamba 2: a convolution, three numbers per head, a norm."""
    width, heads, mixed = text["hidden_size"], text["mamba_n_heads"], mixed_width(text)
    inner, bias = heads * text["mamba_d_head"], bool(text.get("mamba_proj_bias"))
    matrices = [
        Matrix("mamba.in_proj", width, inner + mixed + heads, bias),
        Matrix("mamba.out_proj", inner, width, bias),
    ]
    kernel = text["mamba_d_conv"] + bool(text.get("mamba_conv_bias"))
    return matrices, kernel * mixed + 3 * heads + inner


_MIXERS = {"conv": _convolution, "linear_attn": _delta, "mamba": _mamba}


def _gemma4(text: Mapping[str, Any], family: Family, index: int, window: int) -> BlockShape:
    """A block of Gemma 4: heads of another size without a window, and the last ones without keys
    and values of their own; beside its feed-forward layer it may have experts.
    """
    own, width = dict(text), text["hidden_size"]
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    if window == FULL:
        own["head_dim"] = text["global_head_dim"] or text["head_dim"]
    same = bool(text.get("attention_k_eq_v")) and window == FULL
    if same:
        own["num_key_value_heads"] = (
            text.get("num_global_key_value_heads") or text["num_key_value_heads"]
        )
    if index >= first > 0 and text["use_double_wide_mlp"]:
        own["intermediate_size"] = 2 * text["intermediate_size"]
    matrices, others = _attention(own, family)
    missing = {"self_attn.v_proj"} if same else set[str]()
    cached = 2 * own["num_key_value_heads"] * own["head_dim"]
    if index >= first:
        missing, cached = {"self_attn.k_proj", "self_attn.v_proj"}, 0
        others -= own["head_dim"]
    matrices = [m for m in matrices if m.path not in missing] + _feed_forward(own, family)
    others += family.norms * width + 1  # a scale of the block
    if text.get("enable_moe_block"):
        matrices += _experts(own, family)
        others += 4 * width + text["num_experts"]  # three norms; the router's scales
    if each := text["hidden_size_per_layer_input"]:
        matrices += [
            Matrix("per_layer_input_gate", width, each),
            Matrix("per_layer_projection", each, width),
        ]
        others += width
    return BlockShape(
        tuple(matrices),
        others,
        cached=cached,
        queries=own["num_attention_heads"] * own["head_dim"],
        inner=ffn(own, family),
    )


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
    if family.mixer != "conv":
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


def _chosen_width(text: Mapping[str, Any]) -> int:
    """Inner width of a layer with experts, summed over those of a token."""
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    chosen = next((text[name] for name in names if text.get(name)), 1)
    return chosen * _expert_width(text) + _shared_width(text)


def _expert_width(text: Mapping[str, Any]) -> int:
    return text.get("moe_intermediate_size") or text["intermediate_size"]


def _shared_width(text: Mapping[str, Any]) -> int:
    """Inner width of the experts that every token uses."""
    names = ("shared_expert_intermediate_size", "shared_intermediate_size")
    count = text.get("n_shared_experts") or 0
    return next((text[name] for name in names if text.get(name)), count * _expert_width(text))


def _experts(text: Mapping[str, Any], family: Family) -> list[Matrix]:
    width, inner, shared = text["hidden_size"], _expert_width(text), _shared_width(text)
    experts, (router, stacked) = _count_experts(text), family.experts
    matrices = [Matrix(router, width, experts, kind="router")]
    for name, ins, outs in (
        ("gate_proj", width, inner),
        ("up_proj", width, inner),
        ("down_proj", inner, width),
    ):
        matrices.append(Matrix(f"{stacked}.{name}", ins, outs, kind="experts", copies=experts))
    if shared:
        *first, last = family.shared
        outs = shared * (3 - len(first))
        matrices += [Matrix(path, width, outs) for path in first]
        matrices.append(Matrix(last, shared, width))
    if family.shared_gate:
        matrices.append(Matrix(family.shared_gate, width, 1, kind="router"))
    return matrices
