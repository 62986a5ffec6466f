"""Conversion of GGUF metadata to config.json and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from localrl.errors import ConfigError
from localrl.gguf.families import ATTENTION_BIASES, MLP_BIASES, GGUFFamily
from localrl.gguf.reader import GGUF, refused

SETTINGS: dict[str, str] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
"""Counts: map from config.json names to GGUF names, without the architecture prefix."""

EPSILON = "attention.layer_norm_rms_epsilon"
MOST = 1 << 31
MOST_BLOCKS = 10_000
MOST_HEADS = 100_000
NEUTRAL: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "rope.scaling.attn_factor": (0, 1),
}
"""Settings that would change the model, and the values at which they have no effect."""

GEMMA_WINDOW, GEMMA_PATTERN, GEMMA_LOCAL_BASE = 512, 6, 10_000.0
GEMMA_LARGE = 62
"""Number of blocks of Gemma 3 27B, which scales queries by width / heads, not by head size."""


def config_of(file: GGUF, family: GGUFFamily) -> dict[str, Any]:
    """Build the config.json of a model, without quantisation and end tokens.

    Raises: ConfigError for settings that are missing, impossible, or unsupported by mlx-lm.
    """
    reader = _Settings(file, family.architecture)
    reader.check_neutral()
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise refused(file.path, "it has no matrix token_embd.weight")
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.transformers],
        **reader.counts(),
        "vocab_size": embedding.shape[0],
        "rms_norm_eps": reader.number(EPSILON),
        "rope_theta": reader.number("rope.freq_base", 1e6 if family.norms_plus_one else 1e4),
        "hidden_act": "gelu_pytorch_tanh" if family.norms_plus_one else "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    scaling = _scaling(reader, config)
    if scaling:
        config["rope_scaling"] = scaling
    if family.architecture == "gemma3":
        config |= _gemma(reader, config)
    if family.may_have_biases:
        config |= _biases(file)
    _check_heads(file, family, config)
    return config


def metadata_of(family: GGUFFamily, config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Convert a config.json to GGUF settings; int means uint32 and float means float32 there.

    The inverse of `config_of`, except Llama 3's rope frequencies, which are a tensor: see
    `rope_factors`.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    full = {"num_key_value_heads": config["num_attention_heads"], **config, "head_dim": head_dim}
    named: dict[str, int | float | str] = {
        theirs: full[ours] for ours, theirs in SETTINGS.items() if full.get(ours) is not None
    }
    named |= {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
        EPSILON: float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta") or 1e4),
    }
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        named["rope.scaling.type"] = kind
        named["rope.scaling.factor"] = float(scaling["factor"])
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        named["rope.scaling.original_context_length"] = original
    if family.architecture == "gemma3":
        named["attention.sliding_window"] = config.get("sliding_window", GEMMA_WINDOW)
        named |= _unusual(config)
    return {f"{family.architecture}.{name}": value for name, value in named.items()}


def _unusual(config: Mapping[str, Any]) -> dict[str, int | float]:
    """Return Gemma settings that differ from the values common to all its models."""
    pattern = config.get("sliding_window_pattern", GEMMA_PATTERN)
    base = float(config.get("rope_local_base_freq", GEMMA_LOCAL_BASE))
    found: dict[str, int | float] = {}
    if pattern != GEMMA_PATTERN:
        found["attention.sliding_window_pattern"] = pattern
    if base != GEMMA_LOCAL_BASE:
        found["rope.freq_base_swa"] = base
    return found


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """Compute the divisors (head_dim / 2,) of Llama 3's rope frequencies; None for others."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    lengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


class _Settings:
    """The settings of one architecture in a file's metadata."""

    def __init__(self, file: GGUF, architecture: str):
        self.file = file
        self.architecture = architecture

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def whole(self, name: str, default: int | None = None, most: int = MOST) -> int:
        """Read a positive whole number; an array over all blocks must have a single value.

        Raises: ConfigError if it is missing without a default, or impossible.
        """
        value = self.file.get(self.key(name), (int, np.ndarray), default)
        if isinstance(value, np.ndarray):
            different = np.unique(value)
            if len(different) != 1:
                raise refused(
                    self.file.path, f"its blocks differ in {self.key(name)}, unsupported by mlx-lm"
                )
            value = different[0].item()
        if not isinstance(value, int) or not 0 < value < most:
            what = "missing" if value is None else f"impossible: {value!r:.40}"
            raise refused(self.file.path, f"its {self.key(name)} is {what}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Read a positive finite number.

        Raises: ConfigError if it is missing without a default, or impossible.
        """
        value = self.file.get(self.key(name), (float, int), default)
        if value is None or not 0 < value < math.inf:
            what = "missing" if value is None else f"impossible: {value!r:.40}"
            raise refused(self.file.path, f"its {self.key(name)} is {what}")
        # The file has float32: use the shortest decimal that rounds to the same value.
        return float(str(np.float32(value)))

    def counts(self) -> dict[str, int]:
        """Read the counts of config.json."""
        heads = self.whole("attention.head_count", most=MOST_HEADS)
        width = self.whole("embedding_length")
        rope = self.whole("rope.dimension_count", max(1, width // heads))
        return {
            "hidden_size": width,
            "num_hidden_layers": self.whole("block_count", most=MOST_BLOCKS),
            "intermediate_size": self.whole("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.whole("attention.head_count_kv", heads),
            "head_dim": self.whole("attention.key_length", rope),
            "max_position_embeddings": self.whole("context_length"),
        }

    def check_neutral(self) -> None:
        """Check for settings that mlx-lm would compute wrongly.

        Raises: ConfigError if there is one.
        """
        for name, neutral in NEUTRAL.items():
            value = self.file.metadata.get(self.key(name), neutral[0])
            if value not in neutral:
                raise refused(
                    self.file.path,
                    f"its {self.key(name)} is {value!r:.40}, which is not supported",
                )
        if self.file.metadata.get(self.key("attention.causal"), True) is not True:
            raise refused(self.file.path, "its attention is not causal")


def _check_heads(file: GGUF, family: GGUFFamily, config: Mapping[str, Any]) -> None:
    """Check the sizes of heads.

    Raises: ConfigError if they are inconsistent, or only a part of a head is rotated.
    """
    reader, size = _Settings(file, family.architecture), config["head_dim"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := reader.whole(name, size)) != size:
            raise refused(
                file.path, f"its {reader.key(name)} is {found}, but its heads have {size}"
            )
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % shared or size % 2:
        raise refused(file.path, f"it has {heads} heads, {shared} key heads, of size {size}")
    if family.architecture == "qwen2" and heads * size != config["hidden_size"]:
        raise refused(
            file.path, f"its {heads} heads of {size} are not {config['hidden_size']} wide"
        )


def _biases(file: GGUF) -> dict[str, bool]:
    found = {}
    for name, parts in (("attention_bias", ATTENTION_BIASES), ("mlp_bias", MLP_BIASES)):
        found[name] = any(f"blk.0.{part}.bias" in file.tensors for part in parts)
    return {name: True for name, is_there in found.items() if is_there}


def _gemma(reader: _Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    large = config["num_hidden_layers"] == GEMMA_LARGE
    scale = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    pattern = reader.file.metadata.get(reader.key("attention.sliding_window_pattern"))
    return {
        "sliding_window": reader.whole("attention.sliding_window", GEMMA_WINDOW),
        "sliding_window_pattern": _pattern(reader, pattern, config["num_hidden_layers"]),
        "query_pre_attn_scalar": scale,
        "rope_local_base_freq": reader.number("rope.freq_base_swa", GEMMA_LOCAL_BASE),
    }


def _pattern(reader: _Settings, value: Any, layers: int) -> int:
    """Return the period, in blocks, of full attention."""
    if value is None:
        return GEMMA_PATTERN
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_BLOCKS:
        return value
    if isinstance(value, np.ndarray):  # for each block, true if it has a window
        full = np.flatnonzero(value == 0)
        period = int(full[0]) + 1 if len(full) else 0
        wanted = [(i + 1) % period != 0 for i in range(layers)] if period else None
        if wanted is not None and [bool(v) for v in value] == wanted:
            return period
    raise refused(
        reader.file.path, f"its windows follow no pattern that mlx-lm supports: {value!r:.80}"
    )


def _scaling(reader: _Settings, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rope scaling of config.json, or None."""
    factors = _llama3(reader, config)
    kind = reader.file.get(reader.key("rope.scaling.type"), str, "none")
    old = reader.file.get(reader.key("rope.scale_linear"), (float, int))
    if kind == "none" and old not in (None, 0, 1):
        kind = "linear"
    if factors is not None and kind in ("none", "linear"):
        return factors
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or factors is not None:
        raise refused(reader.file.path, f"its rope scaling is {kind!r:.40}, which is not supported")
    factor = reader.number("rope.scaling.factor", old)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    original = reader.whole("rope.scaling.original_context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def _llama3(reader: _Settings, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Recover Llama 3's rope settings from the factors that GGUF stores instead."""
    file = reader.file
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.type.name != "F32" or tensor.shape != (config["head_dim"] // 2,):
        raise refused(file.path, f"its rope_freqs.weight is {tensor.type.name} {tensor.shape}")
    factors = file.raw(tensor)[0].view(np.float32)
    if (factors == 1).all():
        return None
    for exponent in range(10, 21):
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << exponent,
        }
        again = rope_factors({**config, "rope_scaling": scaling})
        if again is not None and np.allclose(again, factors, rtol=1e-4):
            return scaling
    raise ConfigError(
        f"{file.path} is refused: the factors in its rope_freqs.weight are not those of Llama 3, "
        "and mlx-lm supports no others. Use the model in MLX or Hugging Face format."
    )
