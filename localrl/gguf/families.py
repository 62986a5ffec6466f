"""Model families in GGUF and in mlx-lm: tensor names, row order, settings; in both directions."""

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
"""Tensors outside the blocks, without `.weight`; a tied head is not stored."""

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
"""Tensor (head_dim / 2,) that divides rope frequencies; GGUF stores Llama 3's scaling this way."""


@dataclass(frozen=True)
class GGUFFamily:
    """Differences between GGUF and mlx-lm in how one family is stored."""

    architecture: str
    """`general.architecture` in GGUF, and the prefix of its settings."""
    model_type: str
    """`model_type` in config.json."""
    transformers: str
    """Class named under `architectures` in config.json."""
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    """Tensor names of a block, without `blk.N.` and `model.layers.N.`."""
    permuted: tuple[str, ...] = ()
    """Tensors whose rows GGUF stores in pairs, see `to_halves`."""
    norms_plus_one: bool = False
    """True if GGUF stores 1 + w where mlx-lm stores w."""
    overflows: bool = False
    """True if activations can be too large for float16, so float32 is used instead."""
    biases: tuple[str, ...] = ()
    """Tensors of a block that always have a bias."""
    may_have_biases: bool = False
    """True if config.json can declare biases of the attention or feed-forward layers."""


FAMILIES: dict[str, GGUFFamily] = {
    family.architecture: family
    for family in (
        GGUFFamily(
            "llama",
            "llama",
            "LlamaForCausalLM",
            permuted=("attn_q", "attn_k"),
            may_have_biases=True,
        ),
        GGUFFamily("qwen2", "qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
        GGUFFamily("qwen3", "qwen3", "Qwen3ForCausalLM", block={**_BLOCK, **_HEAD_NORMS}),
        GGUFFamily(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            block={**_BLOCK, **_HEAD_NORMS, **_AROUND},
            norms_plus_one=True,
            overflows=True,
        ),
    )
}
"""Families by `general.architecture`. Mistral's models are stored as llama."""

ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")


def find_family(architecture: str) -> GGUFFamily:
    """Find a family by its GGUF architecture.

    Raises: ConfigError for an unknown one, naming the known ones.
    """
    if architecture not in FAMILIES:
        raise ConfigError(
            f"GGUF files of the family {architecture!r:.80} cannot be read, only those of "
            f"{', '.join(FAMILIES)}. Use the model in MLX or Hugging Face format."
        )
    return FAMILIES[architecture]


def family_of(model_type: str) -> GGUFFamily:
    """Find a family by the model_type in config.json.

    Raises: ConfigError for one that GGUF export does not support.
    """
    for family in FAMILIES.values():
        if model_type in (family.model_type, *_SAME.get(family.model_type, ())):
            return family
    raise ConfigError(
        f"GGUF export does not support models of type {model_type!r:.80}, only mistral, "
        f"{', '.join(f.model_type for f in FAMILIES.values())}. Use --fused, then llama.cpp's own "
        "convert_hf_to_gguf.py."
    )


_SAME = {"llama": ("mistral",)}


def tensor_names(family: GGUFFamily, config: Mapping[str, Any]) -> dict[str, str]:
    """Map GGUF's names of all tensors of a model to mlx-lm's, one to one.

    config: entries of config.json: number of blocks, biases, and whether there is a head.
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
    """Return a tensor's role within its block, or outside: GGUF's name without numbers."""
    return name.rsplit(".", 1)[0].split(".")[-1]


def row_heads(family: GGUFFamily, name: str, config: Mapping[str, Any]) -> int:
    """Return the number of heads of a tensor whose rows must be reordered, else 0.

    name: the tensor's GGUF name.
    """
    if part_of(name) not in family.permuted:
        return 0
    return config["num_attention_heads" if part_of(name) == "attn_q" else "num_key_value_heads"]


def to_halves(rows: Any, heads: int) -> Any:
    """Reorder rows of GGUF's llama for mlx-lm: within a head, even rows first, then odd rows.

    rows: a NumPy or MLX array whose first axis is (heads * head_dim). llama.cpp rotates
    neighbouring rows together, mlx-lm rows of the two halves of a head.
    """
    shape = rows.shape
    return rows.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def to_pairs(rows: Any, heads: int) -> Any:
    """Invert `to_halves`: reorder rows for GGUF."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def is_norm(name: str) -> bool:
    """Return True if a tensor, by its GGUF name, is the weight of a norm."""
    return part_of(name).endswith("norm")
