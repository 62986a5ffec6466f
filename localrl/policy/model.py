"""The policy: one model, its adapters and its tokenizer.

Loading goes through mlx-lm and never touches the network: a model is a folder on this machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.errors import ConfigError
from localrl.policy.activations import use_fast_swiglu
from localrl.policy.array_decode import ArrayCache, prefill
from localrl.policy.array_model import ArrayModel
from localrl.policy.folder import check_folder
from localrl.policy.lora import attach, fill
from localrl.policy.precision import dequantise, quantise, to_float32
from localrl.policy.prefix import fork_prompts
from localrl.policy.rope import rope_settings
from localrl.policy.tokenizer import Tokenizer, load_tokenizer

Logits = mx.array | np.ndarray
"""NumPy's where it computes them."""


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
    shares_prompts: bool = False
    """Whether rows may read the keys and values of one prompt: see `prefix.fork_prompts`."""
    arrays: ArrayModel | None = None
    """The model as NumPy computes it; None where MLX does all."""

    @property
    def engine(self) -> str:
        """The name of what computes it, as `model.engine` has it."""
        return "mlx" if self.arrays is None else "cpu"

    def prefill(self, tokens: np.ndarray, lengths: Sequence[int]) -> tuple[Any, Logits]:
        """Run right-padded prompts (P, L): a cache of P rows, and the logits (P, V) after each.

        The head runs on the last position of each prompt alone, where the family allows it. All is
        computed when this returns.
        """
        if self.arrays is not None:
            return prefill(self.arrays, tokens, np.array(lengths, np.int32))
        cache, logits = self._prefill(mx.array(tokens), lengths)
        mx.eval(logits, [layer.state for layer in cache])
        return cache, logits

    def _prefill(self, tokens: mx.array, lengths: Sequence[int]) -> tuple[list[Any], mx.array]:
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

    def fork(self, prefilled: Any, rows: np.ndarray, names: Sequence[int] | None) -> list[Any]:
        """Caches of B rows that go on from prefilled ones: see `prefix.fork_prompts`."""
        if self.arrays is None:
            return fork_prompts(prefilled, rows, names)
        return [ArrayCache(self.arrays, prefilled, rows, names)]

    def step(self, tokens: np.ndarray, cache: Sequence[Any]) -> Logits:
        """Feed one token (B,) to each row of forked caches: the logits (B, V) after it."""
        if self.arrays is None:
            return self.model(mx.array(tokens[:, None]), cache=cache)[:, -1]
        return cache[0].step(tokens)


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
    return _shape(folder, check_folder(folder))


def _shape(folder: Path, config: Mapping[str, Any]) -> ModelShape:
    text = {**config, **config.get("text_config", {})}
    try:
        sizes = [text[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    except KeyError as missing:
        raise ConfigError(
            f"{folder / 'config.json'} has no {missing}; name the folder of a language model."
        ) from None
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
        raise ConfigError(f"{folder / 'config.json'} has impossible sizes: {sizes!s:.80}.")
    return ModelShape(*sizes)


@dataclass(frozen=True)
class LoadedModel:
    """A model as it lies in its folder, before adapters."""

    model: Any
    tokenizer: Tokenizer


def load_model(
    folder: Path,
    *,
    quantize: int = 0,
    thinking: str = "auto",
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """Read a model folder through mlx-lm; weights are loaded when first used.

    quantize: bits of a weight; 0 leaves them as they are stored. thinking: see `load_tokenizer`.
    tokenizer: that of the folder, where it has been read already.

    Raises: ConfigError when the folder is refused or cannot be read as a model.
    """
    from mlx_lm.utils import load_model as load

    if quantize not in (0, 4, 8):
        raise ConfigError(f"model.quantize is {quantize}; it must be 0, 4 or 8.")
    config = check_folder(folder)
    _shape(folder, config)
    try:
        changes = rope_settings(config)
        model = load(folder, lazy=True, trust_remote_code=False, model_config=changes)[0]
    except ConfigError:
        raise
    except Exception as error:  # a family's own code meets a configuration that nobody has checked
        raise ConfigError(f"Cannot load the model in {folder}: {_told(error, config)}") from error
    if quantize not in (0, _stored_bits(config)):
        quantise(model, quantize)
    return LoadedModel(model, tokenizer or load_tokenizer(folder, thinking=thinking))


def _stored_bits(config: Mapping[str, Any]) -> int:
    """Bits of most matrices of a model that is quantised already; single ones may have others."""
    settings = config.get("quantization")
    bits = settings.get("bits") if isinstance(settings, Mapping) else None
    return bits if isinstance(bits, int) else 0


def _told(error: Exception, config: Mapping[str, Any]) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if "auto_map" in config and "not supported" in text:
        return f"{text} It needs code of its own (auto_map); localrl runs no code out of models."
    return text


def make_policy(
    loaded: LoadedModel,
    *,
    rank: int,
    scale: float,
    seed: int,
    for_cpu: bool,
    dense: bool,
    layers: int = 0,
    keys: Collection[str] = (),
    weights: Mapping[str, mx.array] | None = None,
    source: object = None,
) -> Policy:
    """The policy: this very model, its base frozen, with adapters on it: see `lora.attach`.

    Without `weights`, which come from an adapter in the folder `source`, they change nothing yet.
    `for_cpu` casts what floats there are to float32 and takes a faster activation, `dense` unpacks
    the quantised layers; both in place: there is one copy of the weights.
    """
    model = loaded.model
    if dense:
        dequantise(model, as_float32=for_cpu)
    if for_cpu:
        to_float32(model)
        use_fast_swiglu(model)
    hidden, head = split_head(model)
    adapted = attach(model, rank=rank, scale=scale, seed=seed, layers=layers, keys=keys)
    if weights is not None:
        fill(model, weights, source)
    mx.eval(model.parameters())
    return Policy(model, loaded.tokenizer, adapted, hidden, head)


def split_head(
    model: Any,
) -> tuple[Callable[[mx.array], mx.array] | None, Callable[[mx.array], mx.array] | None]:
    """The body and the head of a model as two functions, checked against the whole.

    Families whose body is `model.model` and whose head is `lm_head` or the tied embedding agree,
    also as the text part of a model that sees images; others (scaled or capped logits) do not, and
    get (None, None): their logits are made whole.
    """
    probe = mx.array([[1, 2, 3, 4]])
    try:
        whole_text = model.language_model if "language_model" in model else model
        body = whole_text.model
        head = whole_text.lm_head if "lm_head" in whole_text else body.embed_tokens.as_linear
        parts = head(body(probe))
    except (AttributeError, TypeError, ValueError):
        return None, None
    whole = model(probe)
    if parts.shape != whole.shape or not mx.allclose(parts, whole, rtol=1e-3, atol=1e-3).item():
        return None, None
    return body, head
