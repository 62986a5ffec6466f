"""Hub id of the unquantised base model, which PEFT and model cards need."""

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
    """Return `given`, else the model that the model folder's card names; None if unknown.

    The `base_model` of a card counts if the folder is a conversion of that model: quantised, or
    with `library_name: mlx`. Otherwise it names the model this one was trained from, a different
    one; an unquantised model requested by its Hub `name` is its own base. For a model shipped in
    a package it is known.

    Raises: ConfigError if `given` is not a Hub id, for example a local path.
    """
    if given is not None:
        if not is_hub_id(given) or Path(given).exists():
            raise ConfigError(
                f"The base model's id is {given!r}; it must be a Hub id such as "
                "Qwen/Qwen3-0.6B, not a folder (--base-id, model.base_id)."
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
    """Check for the form of a model's Hub id; local paths do not have it."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None


def front_matter(model_folder: Path) -> Mapping[str, Any]:
    """Read the model card's front matter; empty if there is none or it is not YAML."""
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
