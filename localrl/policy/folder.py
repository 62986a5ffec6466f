"""Checks of a model folder before anything in it is loaded.

A folder from elsewhere is not trusted: it may refer to files outside itself, or contain code,
pickles, or JSON that exhausts memory. Every check here runs in bounded time and memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError
from localrl.policy.files import MODEL_FILES
from localrl.utils.stored_formats import check_stored, stored_format

WEIGHTS = "model*.safetensors"
"""Pattern of the only files that weights are read from, as in mlx-lm."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.npz", "*.h5", "*.gguf")

INDEX = "model.safetensors.index.json"
"""Index of tensors by file; mlx-lm does not read it."""

MODELOPT = "hf_quant_config.json"
"""Settings of a quantisation by ModelOpt."""

CACHED = "models--"
"""Beginning of the names of folders in the Hub's cache."""

MEGABYTE = 1_000_000
SIZES = {
    "config.json": 4 * MEGABYTE,
    "tokenizer.json": 64 * MEGABYTE,
    "vocab.json": 64 * MEGABYTE,
    INDEX: 32 * MEGABYTE,
    "*.jinja": MEGABYTE,
    "*.json": 16 * MEGABYTE,
    "tokenizer.model": 64 * MEGABYTE,
    "*.tiktoken": 64 * MEGABYTE,
    "*.txt": 64 * MEGABYTE,
}
"""Maximum bytes of each file, about twice the largest real ones. The first match counts."""

PARSED = (
    "config.json",
    "generation_config.json",
    MODELOPT,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    INDEX,
)
"""JSON files that are parsed here first; for the rest only the size is checked."""

VALUES = 8_000_000
"""Maximum values in a JSON file, counted by separators: about 80 bytes of memory each."""

ENTRIES = 10_000
"""Maximum files in a folder."""

COUNT = 100_000
"""Maximum of any count in config.json: layers, heads, experts."""

_FAMILY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NUMBERED = re.compile(r"(num_|n_)(\w*_)?(layers?|heads?|experts?|blocks?|groups?)")


def check_folder(folder: Path) -> dict[str, Any]:
    """Check a model folder without loading it; return its config.json.

    Raises: ConfigError saying what is missing or refused, and what to do.
    """
    found = check_texts(folder)
    config = found["config.json"]
    tensors = _tensors(folder, found.get(INDEX, {}))
    _check_config(folder, config, len(tensors))
    stored_format(config)
    check_stored(config, tensors)
    return config


def check_texts(folder: Path) -> dict[str, dict[str, Any]]:
    """Check everything in a model folder except the weights; return the parsed JSON files.

    Raises: ConfigError saying what is missing or refused.
    """
    if not folder.is_dir() or not (folder / "config.json").exists():
        raise ConfigError(f"There is no model in {folder} (no config.json). {_instead_of(folder)}")
    try:
        _check_files(folder)
        found = {name: read_object(folder / name) for name in PARSED if (folder / name).exists()}
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.") from None
    _check_tokenizer(folder, found.get("tokenizer_config.json", {}))
    if MODELOPT in found:  # where mlx-lm looks if config.json has none
        found["config.json"].setdefault("quantization_config", found[MODELOPT])
    return found


def hub_name(folder: Path) -> str | None:
    """Return user/name if a path is in the folder that the Hub's cache has for a model."""
    place = _cached(folder)
    return place.name.removeprefix(CACHED).replace("--", "/") if place else None


def _cached(folder: Path) -> Path | None:
    """Return the folder of the Hub's cache, one for each model, that a path is in."""
    path = Path(os.path.abspath(folder))
    return next((p for p in (path, *path.parents) if p.name.startswith(CACHED)), None)


def _instead_of(folder: Path) -> str:
    """Say which model to pass instead of a folder that has none."""
    place, name = _cached(folder), hub_name(folder)
    if place is None or name is None:
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        if inside:
            return f"There is one in {inside[0]}: pass that folder with --model."
        return (
            "Pass the folder of an MLX or Hugging Face model with --model, or omit --model to use "
            "the embedded one."
        )
    snapshots = sorted(path.parent for path in place.glob("snapshots/*/config.json"))
    if not snapshots:
        return f"The Hub's cache has only a part of {name}. Fetch it with `localrl pull {name}`."
    from huggingface_hub import constants

    usual = place.parent == Path(os.path.abspath(constants.HF_HUB_CACHE)) and "/" in name
    return (
        f"The folder is the Hub's cache of {name}. Pass --model {name if usual else snapshots[0]}."
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of bounded size.

    Raises: ConfigError if it is too large, too deeply nested, or not an object.
    """
    data = path.read_bytes()
    _check_values(path, data)
    try:
        value = json.loads(data)
    except RecursionError:
        raise ConfigError(f"{path} is refused: its JSON is nested too deeply.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not contain a JSON object.")
    return value


def _check_values(path: Path, data: bytes) -> None:
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > VALUES:
        raise ConfigError(f"{path} is refused: {values} JSON values; at most {VALUES} are read.")


def _check_files(folder: Path) -> None:
    """Check the files of a folder.

    Raises: ConfigError for a file that is too large or lies outside the folder.
    """
    for path in _entries(folder):
        if not path.is_file():
            raise ConfigError(f"{path} is refused: it is not a regular file, or is a broken link.")
        if not _is_within(path, folder):
            raise ConfigError(
                f"{path} is refused: it links to {path.resolve()}, outside the model's folder. "
                "Replace the link by the file itself."
            )
        limit = next((most for name, most in SIZES.items() if fnmatch(path.name, name)), None)
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise ConfigError(f"{path} is refused: {size} bytes; at most {limit} are read.")
        if path.name in ("tokenizer.json", "vocab.json"):
            _check_values(path, path.read_bytes())


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the files that a loader may read: those matching the patterns, and extra templates."""
    for place in (folder, folder / "additional_chat_templates"):
        if not place.is_dir():
            continue
        if place != folder and not _is_within(place, folder):
            raise ConfigError(f"{place} is refused: it links outside the model's folder.")
        with os.scandir(place) as entries:
            for number, entry in enumerate(entries):
                if number >= ENTRIES:
                    raise ConfigError(f"{place} is refused: more than {ENTRIES} files.")
                if any(fnmatch(entry.name, pattern) for pattern in MODEL_FILES):
                    yield Path(entry.path)


def _is_within(path: Path, folder: Path) -> bool:
    """Check that a file is in the folder, or among the files that the Hub's cache links to."""
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    return path.resolve().is_relative_to(home)


def _tensors(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the number format of every tensor in the weight files; headers are parsed strictly.

    Raises: ConfigError if there is no weight file, or one is missing, damaged or outside the
    folder.
    """
    for name in _index_names(folder, index):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder / name} is missing, although the model's index lists it. Fetch the model "
                "again with `localrl pull`."
            )
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        raise ConfigError(f"Cannot load the model in {folder}: {_no_weights(folder)}")
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "numpy") as weights:
                names = weights.keys()
                found |= {name: weights.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a valid safetensors file: {error}.") from None
    return found


def _index_names(folder: Path, index: Mapping[str, Any]) -> set[str]:
    names = index.get("weight_map", {})
    if not isinstance(names, dict):
        raise ConfigError(f"{folder / INDEX} has no valid weight_map.")
    found = {name if isinstance(name, str) else "" for name in names.values()}
    for name in found:
        _check_name(folder / INDEX, "a weight file", name)
    return found


def _no_weights(folder: Path) -> str:
    others = sorted(p.name for kind in PICKLES for p in folder.glob(kind))
    if not others:
        return f"it contains no {WEIGHTS}."
    return (
        f"its weights are in {', '.join(others[:3])}; localrl reads only safetensors, because "
        "other formats can run code when opened, and GGUF if --model names the file itself. "
        "Look for the model in safetensors format, or convert it with its maker's tools."
    )


def _check_name(path: Path, what: str, name: str) -> None:
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise ConfigError(
            f"{path} is refused: it names {name[:80]!r} as {what}; only files next to it are read."
        )


def _check_config(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    path = folder / "config.json"
    if (code := config.get("model_file")) is not None:
        raise ConfigError(
            f"{path} is refused: the model needs its own code ({str(code)[:80]!r}), and localrl "
            "runs no code from model folders."
        )
    family = config.get("model_type")
    if not isinstance(family, str) or not _FAMILY.fullmatch(family):
        raise ConfigError(
            f"{path} has no valid model_type: {str(family)[:80]!r}. Choose the folder of a "
            "language model."
        )
    for part in (config, config.get("text_config")):
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ConfigError(f"{path} is refused: its text_config is not an object.")
        _check_counts(path, part, tensors)


def _check_counts(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Check counts, because they decide how much is built before the first weight is read."""
    for name, value in config.items():
        if not isinstance(value, int) or not _NUMBERED.fullmatch(name):
            continue
        most = tensors if name == "num_hidden_layers" else COUNT
        if not 0 <= value <= most:
            raise ConfigError(
                f"{path} is refused: {name} is {str(value)[:20]}, but at most {most} is possible: "
                f"there are {tensors} tensors in the weight files."
            )


def _check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Check the tokenizer's configuration.

    Raises: ConfigError for names of files that are not next to it, or of unknown modules.
    """
    path = folder / "tokenizer_config.json"
    for name, value in config.items():
        if name.endswith("_file") and value is not None:
            _check_name(path, name, value if isinstance(value, str) else "")
        is_module = name in ("chat_template_type", "tool_parser_type") and value is not None
        if is_module and not str(value).isidentifier():
            raise ConfigError(f"{path} is refused: {name} is {str(value)[:80]!r}.")
