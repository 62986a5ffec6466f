"""Starting a run from an existing adapter: what it sets, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localrl.config import LoraConfig, RunConfig
from localrl.errors import ConfigError
from localrl.export.adapters import Adapter, read_adapter


def starting_adapter(config: RunConfig, blocks: int) -> tuple[RunConfig, Adapter | None]:
    """The adapter that `lora.adapter` names, and the configuration with its rank, scale and places.

    blocks: of the model. A setting counts as the user's when it is not the default.

    Raises: ConfigError when there is no adapter, or when a setting contradicts it; CheckpointError
    when it is damaged.
    """
    if config.lora.adapter is None:
        return config, None
    folder = config.lora.adapter
    adapter = read_adapter(Path(folder))
    values: dict[str, Any] = {
        "rank": adapter.rank,
        "scale": adapter.scale,
        "layers": adapter.layers_of(blocks),
        "keys": adapter.keys,
    }
    for name, value in values.items():
        _agree(name, getattr(config.lora, name), value, folder)
        config = config.replace(f"lora.{name}", value)
    return config, adapter


def _agree(name: str, wish: Any, value: Any, folder: str) -> None:
    """Raises: ConfigError when the user asked for another value than the adapter's."""
    asked = wish != getattr(LoraConfig(), name)
    same = set(wish) == set(value) if name == "keys" else wish == value
    if asked and not same:
        raise ConfigError(
            f"lora.{name} is {_plain(wish)}, but the adapter in {folder} has {_plain(value)}. "
            f"Leave lora.{name} out, or start without --adapter."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
