"""Families of models as GGUF has them and as mlx-lm has them: names, rows, settings; both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localrl.errors import ConfigError

ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Tensors outside of the blocks, without `.weight`; a tied head is not stored."""

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor (head_dim / 2,) by which rotary frequencies are divided: how Llama 3 is stored."""


@dataclass(frozen=True)
class Family:
    """One family: where GGUF's way to store it and mlx-lm's differ."""

    architecture: str
    """`general.architecture` in GGUF, and the prefix of its settings."""
    model_type: str
    """In config.json."""
    transformers: str
    """The class that config.json names under `architectures`."""
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    """Tensors of a block, without `blk.N.` and `model.layers.N.`."""
    permuted: tuple[str, ...] = ()
    """Tensors whose rows GGUF has in the order of pairs: see `to_halves`."""
    norms_plus_one: bool = False
    """Whether GGUF has 1 + w where mlx-lm has w."""
    overflows: bool = False
    """Whether activations can be too large for float16, so that they are to be float32 instead."""
    biases: tuple[str, ...] = ()
    """Tensors of a block that always have a bias."""
    may_have_biases: bool = False
    """Whether config.json can say that the attention or the feed-forward layers have biases."""


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "llama",
            "llama",
            "LlamaForCausalLM",
            permuted=("attn_q", "attn_k"),
            may_have_biases=True,
        ),
        Family("qwen2", "qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", block={**_BLOCK, **_HEAD_NORMS}),
        Family(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            block={**_BLOCK, **_HEAD_NORMS, **_AROUND},
            norms_plus_one=True,
            overflows=True,
        ),
    )
}
"""By `general.architecture`. Mistral's models are stored as llama."""

ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")


def find_family(architecture: str) -> Family:
    """The family that GGUF calls so.

    Raises: ConfigError for one that is not known, naming those that are.
    """
    if architecture not in FAMILIES:
        raise ConfigError(
            f"GGUF files of the family {architecture!r:.80} cannot be read; there are "
            f"{', '.join(FAMILIES)}. Take the model in MLX's or Hugging Face's form."
        )
    return FAMILIES[architecture]


def family_of(model_type: str) -> Family:
    """The family that config.json calls so.

    Raises: ConfigError for one that GGUF is not written for.
    """
    for family in FAMILIES.values():
        if model_type in (family.model_type, *_SAME.get(family.model_type, ())):
            return family
    raise ConfigError(
        f"GGUF is not written for models of type {model_type!r:.80}; it is for mistral, "
        f"{', '.join(f.model_type for f in FAMILIES.values())}. Take --fused, and llama.cpp's own "
        "convert_hf_to_gguf.py."
    )


_SAME = {"llama": ("mistral",)}


def tensor_names(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Names of all tensors of a model: GGUF's to mlx-lm's, a one-to-one table.

    config: of config.json: the number of blocks, and whether there are biases and a head.
    """
    ends = dict(ENDS)
    if config.get("tie_word_embeddings"):
        del ends["output"]
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in ends.items()}
    biases = list(family.biases)
    biases += ATTENTION_BIASES if config.get("attention_bias") and family.may_have_biases else ()
    biases += MLP_BIASES if config.get("mlp_bias") and family.may_have_biases else ()
    for index in range(config["num_hidden_layers"]):
        for ours, theirs in family.block.items():
            ends_with = ("weight", "bias") if ours in biases else ("weight",)
            for end in ends_with:
                names[f"blk.{index}.{ours}.{end}"] = f"model.layers.{index}.{theirs}.{end}"
    return names


def part_of(name: str) -> str:
    """What a tensor is within its block, or outside of them: GGUF's name without numbers."""
    return name.rsplit(".", 1)[0].split(".")[-1]


def row_heads(family: Family, name: str, config: Mapping[str, Any]) -> int:
    """For a tensor whose rows are to be put in another order, its heads; else 0.

    name: GGUF's.
    """
    if part_of(name) not in family.permuted:
        return 0
    return config["num_attention_heads" if part_of(name) == "attn_q" else "num_key_value_heads"]


def to_halves(rows: Any, heads: int) -> Any:
    """Rows of GGUF's llama in mlx-lm's order: within a head the even ones, then the odd ones.

    rows: an array of NumPy or MLX whose first axis is (heads * head_dim). llama.cpp rotates
    neighbouring rows together, mlx-lm those of the two halves of a head.
    """
    shape = rows.shape
    return rows.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def to_pairs(rows: Any, heads: int) -> Any:
    """The inverse of `to_halves`: rows in the order that GGUF has them in."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def is_norm(name: str) -> bool:
    """Whether a tensor, by GGUF's name, is the weight of a norm."""
    return part_of(name).endswith("norm")
