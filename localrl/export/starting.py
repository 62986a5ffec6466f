"""Starting a run from an existing adapter: settings it determines, and conflicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localrl.config import RunConfig
from localrl.errors import ConfigError
from localrl.export.adapters import CONFIG as ADAPTER_CONFIG
from localrl.export.adapters import Adapter, read_adapter
from localrl.settings import LoraConfig


def starting_adapter(config: RunConfig, blocks: int) -> tuple[RunConfig, Adapter | None]:
    """Load the adapter named by `lora.adapter`; return the configuration with its rank, scale,
    layers and keys, and the adapter.

    blocks: number of blocks of the model. A setting counts as the user's if it is not the default.

    Raises: ConfigError if there is no adapter or a setting contradicts it; CheckpointError if it
    is damaged.
    """
    if config.lora.adapter is None:
        return config, None
    config = config.replace("lora.adapter", str(_of_run(Path(config.lora.adapter))))
    folder = config.lora.adapter or ""
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


def _of_run(folder: Path) -> Path:
    """Return the adapter's folder: of a run the one in it."""
    inside = folder / "adapter"
    there = (folder / ADAPTER_CONFIG).is_file()
    return inside if not there and (inside / ADAPTER_CONFIG).is_file() else folder


def _agree(name: str, wish: Any, value: Any, folder: str) -> None:
    """Check a setting against the adapter's value.

    Raises: ConfigError if the user set a different value.
    """
    asked = wish != getattr(LoraConfig(), name)
    same = set(wish) == set(value) if name == "keys" else wish == value
    if asked and not same:
        raise ConfigError(
            f"lora.{name} is {_plain(wish)}, but the adapter in {folder} has {_plain(value)}. "
            f"Remove lora.{name}, or start without --adapter."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
