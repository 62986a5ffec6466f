"""The name of the unquantised base model on the Hub, which PEFT and model cards need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from localrl.errors import ConfigError
from localrl.export.tensors import read_json
from localrl.utils.packaged import PACKAGED_MODELS

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_base_id(given: str | None, model_folder: Path, name: str | None = None) -> str | None:
    """`given`, else what the card of the model folder says it was converted from; None: unknown.

    The `base_model` of a card counts when the folder is a conversion of that model: quantised, or
    with `library_name: mlx`. Elsewhere it names what the model was trained from, another model;
    one that is not quantised and was asked for by its `name` on the Hub is its own base. Of a model
    that a package ships it is known.

    Raises: ConfigError when `given` is not a Hub id, such as a path of this machine.
    """
    if given is not None:
        if not is_hub_id(given) or Path(given).exists():
            raise ConfigError(
                f"The base model's id is {given!r}; it must be one of the Hub, like "
                "Qwen/Qwen3-0.6B, and not a folder (--base-id, model.base_id)."
            )
        return given
    packaged = PACKAGED_MODELS.get(name or "")
    if packaged is not None and not Path(packaged.name).is_dir():
        return packaged.base_id
    card = front_matter(model_folder)
    base = card.get("base_model")
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    quantised = _is_quantised(model_folder)
    if is_hub_id(base) and (quantised or card.get("library_name") == "mlx"):
        return base
    asked_for = is_hub_id(name) and not Path(name).exists()
    return name if asked_for and not quantised else None


def is_hub_id(name: Any) -> TypeGuard[str]:
    """Whether this has the form of a model's name on the Hub; paths of a machine do not."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None


def front_matter(model_folder: Path) -> Mapping[str, Any]:
    """The metadata at the head of the model card; empty when there is none or it is not YAML."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = model_folder / "README.md"
    try:
        return (metadata_load(path) or {}) if path.is_file() else {}
    except (ValueError, OSError, YAMLError):
        return {}


def _is_quantised(model_folder: Path) -> bool:
    config = read_json(model_folder / "config.json")
    return bool(config.get("quantization") or config.get("quantization_config"))
