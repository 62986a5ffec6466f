"""The settings of a config.json that determine sizes, checked and completed with defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from localrl.errors import ConfigError
from localrl.memory.families import Family

MOST_LAYERS = 100_000
"""Maximum number of blocks; more are an error in the file."""

_REQUIRED = ("num_hidden_layers", "hidden_size", "vocab_size")
_POSITIVE = (
    *_REQUIRED,
    *("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
    *("sliding_window_pattern", "decoder_sparse_step", "conv_L_cache", "block_multiple_of"),
    "full_attention_interval",
)
_COUNTS = (
    *("sliding_window", "num_experts", "num_local_experts", "n_routed_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "block_ff_dim"),
    *("shared_expert_intermediate_size", "first_k_dense_replace", "linear_conv_kernel_dim"),
    *("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads"),
    *("linear_value_head_dim", "shared_intermediate_size", "top_k_experts", "num_kv_shared_layers"),
    *("hidden_size_per_layer_input", "vocab_size_per_layer_input", "global_head_dim"),
    "num_global_key_value_heads",
)
_MAMBA = ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_d_conv", "mamba_n_groups")
_LISTS = ("layer_types", "full_attn_idxs", "mlp_only_layers")
_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_OTHER_SENSES = re.compile(r"(?:.*[._])?(?:vision|visual|audio|vit|image)(?:[._].*)?")


def complete(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the settings of a text model, completed with the family's values and defaults.

    Raises: ConfigError if a size is missing or impossible.
    """
    given = {name: value for name, value in config.items() if value is not None}
    text = {**family.defaults, **given, **family.fixed}
    for name in _REQUIRED:
        if name not in text:
            raise ConfigError(
                f"The config.json has no {name}; give the config.json of a language model."
            )
    for name in (*_POSITIVE, *_MAMBA, *_COUNTS):
        _check_count(name, text.get(name), least=0 if name in _COUNTS else 1)
    for name in _LISTS:
        _check_list(name, text.get(name))
    multiplier = text.get("block_ffn_dim_multiplier", 1.0)
    if not isinstance(multiplier, int | float) or not 0 < multiplier < 1000:
        raise ConfigError(
            f"The config.json has an impossible block_ffn_dim_multiplier: {multiplier!r:.80}."
        )
    if text["num_hidden_layers"] > MOST_LAYERS:
        raise ConfigError(f"The config.json has {text['num_hidden_layers']} layers.")
    _default(text, "num_attention_heads", max(1, text["hidden_size"] // 64))
    _default(text, "num_key_value_heads", text["num_attention_heads"])
    _default(text, "head_dim", text["hidden_size"] // text["num_attention_heads"])
    _default(text, "intermediate_size", 4 * text["hidden_size"])
    _default(text, "tie_word_embeddings", False)
    types = text.get("layer_types")
    for name in _MAMBA if family.mixer == "mamba" and "mamba" in (types or ()) else ():
        if name not in text:
            raise ConfigError(f"The config.json has no {name}, which its Mamba layers need.")
    if types is not None and len(types) != text["num_hidden_layers"]:
        raise ConfigError(
            f"The config.json has {len(types)} layer_types for {text['num_hidden_layers']} layers."
        )
    return text


def exceptions(settings: Mapping[str, Any]) -> dict[int | None, dict[str, Any]]:
    """Return quantisation settings of individual matrices, by block number and path in the block.

    The number is None for the embedding and the head. Those of the parts that see or hear, which
    mlx-lm leaves out, are left out.
    """
    found: dict[int | None, dict[str, Any]] = {}
    for name, value in settings.items():
        if not isinstance(value, bool | Mapping) or _OTHER_SENSES.fullmatch(name):
            continue
        if match := _BLOCK.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = value
        else:
            found.setdefault(None, {})[name.rsplit(".", 1)[-1]] = value
    return found


def _check_count(name: str, value: Any, *, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise ConfigError(f"The config.json has an impossible {name}: {value!r:.80}.")


def _check_list(name: str, value: Any) -> None:
    if value is None or (isinstance(value, list) and all(isinstance(v, int | str) for v in value)):
        return
    raise ConfigError(f"The config.json has a {name} that is not a plain list: {value!r:.80}.")


def _default(text: dict[str, Any], name: str, value: Any) -> None:
    if text.get(name) is None:
        text[name] = value
