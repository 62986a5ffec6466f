"""The policy: one model, its adapters and its tokenizer.

Loading goes through mlx-lm and never touches the network: a model is a folder on this machine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.errors import ConfigError
from localrl.policy.activations import use_fast_swiglu
from localrl.policy.lora import attach
from localrl.policy.precision import dequantise, to_float32
from localrl.policy.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Policy:
    """A model with adapters attached, and what the loop needs to talk to it."""

    model: Any
    tokenizer: Tokenizer
    lora_keys: list[str]
    """Paths of the adapted layers inside a block."""
    hidden: Callable[..., mx.array] | None
    """(B, L) tokens to (B, L, d) states before the head; None where the family hides them."""
    head: Callable[[mx.array], mx.array] | None
    """(N, d) states to (N, V) logits."""

    def prefill(self, tokens: mx.array, lengths: Sequence[int]) -> tuple[list[Any], mx.array]:
        """Run right-padded prompts (P, L): a cache of P rows, and the logits (P, V) after each.

        The head runs on the last position of each prompt alone, where the family allows it.
        """
        cache = _empty_cache(self.model, len(lengths))
        padding = [tokens.shape[1] - length for length in lengths]
        for layer in cache:
            layer.prepare(lengths=list(lengths), right_padding=padding)
        rows, last = mx.arange(len(lengths)), mx.array(list(lengths)) - 1
        if self.hidden is None or self.head is None:
            logits = self.model(tokens, cache=cache)[rows, last]
        else:
            logits = self.head(self.hidden(tokens, cache=cache)[rows, last])
        for layer in cache:
            layer.finalize()
        return cache, logits


CACHE_STEP = 64
"""Tokens by which the cache of a batch grows; mlx-lm's 256 would copy mostly empty room here."""


def _empty_cache(model: Any, rows: int) -> list[Any]:
    """mlx-lm's own caches for a batch of this model, one per layer."""
    from mlx_lm.models.cache import make_prompt_cache

    single = make_prompt_cache(model)
    cache = [layer.merge([copy.deepcopy(layer) for _ in range(rows)]) for layer in single]
    for layer in cache:
        if hasattr(layer, "step"):
            layer.step = CACHE_STEP
    return cache


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that plans need, read from its config.json alone."""

    layers: int
    width: int
    vocabulary: int


def read_shape(folder: Path) -> ModelShape:
    """Sizes of the model in the folder.

    Raises: ConfigError when the folder or its config.json is missing or is not a text model's.
    """
    config = _read_config(folder)
    text = config.get("text_config", config)
    try:
        return ModelShape(text["num_hidden_layers"], text["hidden_size"], text["vocab_size"])
    except KeyError as missing:
        raise ConfigError(
            f"{folder / 'config.json'} has no {missing}; name the folder of a language model."
        ) from None


@dataclass(frozen=True)
class LoadedModel:
    """A model as it lies in its folder, before adapters."""

    model: Any
    tokenizer: Tokenizer


def load_model(folder: Path) -> LoadedModel:
    """Read a model folder through mlx-lm; weights are loaded when first used.

    Raises: ConfigError when the folder cannot be read as a model.
    """
    from mlx_lm.utils import load_model as load

    read_shape(folder)
    try:
        model = load(folder, lazy=True, trust_remote_code=False)[0]
    except (FileNotFoundError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"Cannot load the model in {folder}: {error}") from error
    return LoadedModel(model, load_tokenizer(folder))


def make_policy(
    loaded: LoadedModel, *, rank: int, scale: float, seed: int, for_cpu: bool, dense: bool
) -> Policy:
    """The policy: this very model, its base frozen, with fresh adapters that change nothing yet.

    `for_cpu` casts what floats there are to float32 and takes a faster activation, `dense` unpacks
    the quantised layers; both in place: there is one copy of the weights.
    """
    model = loaded.model
    if for_cpu:
        to_float32(model)
        use_fast_swiglu(model)
    if dense:
        dequantise(model)
    hidden, head = split_head(model)
    keys = attach(model, rank=rank, scale=scale, seed=seed)
    mx.eval(model.parameters())
    return Policy(model, loaded.tokenizer, keys, hidden, head)


def split_head(
    model: Any,
) -> tuple[Callable[[mx.array], mx.array] | None, Callable[[mx.array], mx.array] | None]:
    """The body and the head of a model as two functions, checked against the whole.

    Families whose body is `model.model` and whose head is `lm_head` or the tied embedding agree;
    others (scaled or capped logits) do not, and get (None, None): their logits are made whole.
    """
    probe = mx.array([[1, 2, 3, 4]])
    try:
        body = model.model
        head = model.lm_head if "lm_head" in model else body.embed_tokens.as_linear
        parts = head(body(probe))
    except (AttributeError, TypeError, ValueError):
        return None, None
    whole = model(probe)
    if parts.shape != whole.shape or not mx.allclose(parts, whole, rtol=1e-3, atol=1e-3).item():
        return None, None
    return body, head


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise ConfigError(
            f"There is no model in {folder} (no config.json). Give --model the folder of an MLX or "
            "Hugging Face model, or leave it out to train the embedded one."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
