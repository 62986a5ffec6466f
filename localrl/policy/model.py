"""The policy: one model, its adapters and its tokenizer.

Loading goes through mlx-lm and never touches the network: a model is a folder on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrl.backend import mx
from localrl.errors import ConfigError
from localrl.policy.engine import Engine
from localrl.policy.folder import check_folder
from localrl.policy.lora import adapters_off, other_adapters
from localrl.policy.precision import check_weights, float_kinds, match_embeddings, quantise
from localrl.policy.rope import rope_settings
from localrl.policy.selfcheck import Check
from localrl.policy.tokenizer import Tokenizer, load_tokenizer

SHOWN = 4
"""Lines shown of an error."""


@dataclass(frozen=True)
class Policy:
    """A model with adapters attached, its tokenizer and its engine."""

    model: Any
    """mlx-lm module that holds the weights; `engine` computes with them."""
    tokenizer: Tokenizer
    lora_keys: list[str]
    """Paths of the adapted layers inside a block."""
    engine: Engine
    floats: FloatChoice | None = None
    """The format of the base's floats; None if nothing was chosen."""
    checks: list[Check] = field(default_factory=list)
    """The self-checks made so far: one may be made as late as in the first update."""
    reference: Mapping[str, mx.array] | None = None
    """Adapters of the KL's reference, by parameter; None: the model without adapters."""

    def as_reference(self) -> AbstractContextManager[None]:
        """Turn the model into the KL's reference within a context."""
        if self.reference is None:
            return adapters_off(self.model)
        return other_adapters(self.model, self.reference)

    @property
    def sixteen_bit(self) -> bool:
        """True if any float of the model has 16 bits: then passes over the same tokens differ by
        rounding, depending on the batch shape, by hundredths of a nat in bfloat16."""
        return not float_kinds(self.model) <= {mx.float32}


@dataclass(frozen=True)
class FloatChoice:
    """The format of a model's floats: activations, and weights that are not packed."""

    dtype: str
    """`fp16`, `bf16` or `fp32`."""
    reason: str


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model needed for planning, read only from its config.json."""

    layers: int
    width: int
    vocabulary: int


def read_shape(folder: Path) -> ModelShape:
    """Read the sizes of the model in a folder.

    Raises: ConfigError if the folder or its config.json is missing or is not a text model's.
    """
    return _shape(folder, check_folder(folder))


def _shape(folder: Path, config: Mapping[str, Any]) -> ModelShape:
    text = {**config, **config.get("text_config", {})}
    try:
        sizes = [text[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    except KeyError as missing:
        raise ConfigError(
            f"{folder / 'config.json'} has no {missing}. Choose the folder of a language model."
        ) from None
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
        raise ConfigError(f"{folder / 'config.json'} has impossible sizes: {sizes!s:.80}.")
    return ModelShape(*sizes)


@dataclass(frozen=True)
class LoadedModel:
    """A model as loaded from its folder, before adapters."""

    model: Any
    tokenizer: Tokenizer
    reload: Callable[[], Any] | None = None
    """Returns the model as its folder has it, unread; None if there is no folder."""


def load_model(
    folder: Path,
    *,
    quantize: int = 0,
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """Load a model folder through mlx-lm; weights are read when first used.

    quantize: bits per weight; 0 leaves them as stored. tokenizer: the folder's tokenizer, if it has
    already been loaded.

    Raises: ConfigError if the folder is refused or cannot be read as a model.
    """
    if quantize not in (0, 4, 8):
        raise ConfigError(f"model.quantize is {quantize}; it must be 0, 4 or 8.")
    config = check_folder(folder)
    _shape(folder, config)

    def read() -> Any:
        return _read(folder, config, quantize)

    return LoadedModel(read(), tokenizer or load_tokenizer(folder), read)


def _read(folder: Path, config: Mapping[str, Any], quantize: int) -> Any:
    from mlx_lm.utils import load_model as load

    try:
        changes = rope_settings(config)
        model = load(folder, lazy=True, trust_remote_code=False, model_config=changes)[0]
    except ConfigError:
        raise
    except Exception as error:  # a family's own code reads an unchecked configuration
        raise ConfigError(f"Cannot load the model in {folder}: {_told(error, config)}") from error
    check_weights(model)
    if quantize not in (0, _stored_bits(config)):
        quantise(model, quantize)
    match_embeddings(model)
    return model


def _stored_bits(config: Mapping[str, Any]) -> int:
    """Return the default bits of a model stored quantised (some matrices may differ), or 0."""
    settings = config.get("quantization")
    bits = settings.get("bits") if isinstance(settings, Mapping) else None
    return bits if isinstance(bits, int) else 0


def _told(error: Exception, config: Mapping[str, Any]) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    lines = text.splitlines()
    if len(lines) > SHOWN + 1:  # mlx-lm names every tensor that does not fit, one a line
        text = " ".join([*lines[:SHOWN], f"and {len(lines) - SHOWN} more."])
    if "auto_map" in config and "not supported" in text:
        return f"{text} It needs its own code (auto_map); localrl runs no code from models."
    return text
