"""Conversion of a GGUF file, once, to a folder in mlx-lm's layout in localrl's cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError
from localrl.gguf.families import GGUFFamily, find_family
from localrl.gguf.layout import fill, make_plan, write_json
from localrl.gguf.reader import GGUF, read_gguf
from localrl.utils.cache import cache_folder

RECORD = "gguf.json"
"""File in a converted folder that identifies its source."""
FORMAT = 1
"""Format number of converted folders, part of their names; raised when the conversion changes."""
SPARE_BYTES = 1 << 28
"""Bytes of disk space to leave free."""

ABANDONED_S = 24 * 3600.0
"""Age in seconds after which a partial conversion counts as abandoned."""

Tell = Callable[[str], None]


class WrongHash(ConfigError):
    """A file does not have the required SHA-256."""


def as_folder(path: Path, tell: Tell, sha256: str | None = None) -> Path:
    """Return the converted folder of a GGUF file; convert it if necessary.

    A file converted before is recognised by its size and times, else by its SHA-256. The folder is
    complete or does not exist, and the file itself is only read.

    tell: called with a line when a folder is made, and when numbers had to be rounded. sha256: the
    required SHA-256 of the file, if known.

    Raises: ConfigError if the file cannot be read as a model, or the disk is too full; WrongHash.
    """
    stamp = _stamp(path)
    root = cache_folder() / "gguf"
    name = _name(path)
    for folder in sorted(root.glob(f"{name}-*")):
        record = _record(folder)
        if record.get("stamp") == stamp and sha256 in (None, record.get("sha256")):
            return _checked(folder)
    if sha256 is not None and (found := _digest(path)) != sha256:
        raise WrongHash(f"its SHA-256 is {found}, but {sha256} was expected")
    file = read_gguf(path)
    family = find_family(file.get("general.architecture", str, ""))
    digest = sha256 or _digest(path)
    folder = root / f"{name}-{digest[:16]}.{FORMAT}"
    record = {"sha256": digest, "stamp": stamp, "format": FORMAT}
    if _record(folder).get("sha256") != digest:
        _make(file, family, folder, record, tell)
    elif os.access(folder, os.W_OK):
        write_json(folder / RECORD, {**_record(folder), "stamp": stamp})
    return _checked(folder)


def _checked(folder: Path) -> Path:
    """Check that a converted folder is complete: a cache may have been cleaned up.

    Raises: ConfigError if files are missing or differ in size.
    """
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != RECORD}
    lost = [name for name, size in _record(folder)["files"].items() if files.get(name) != size]
    if lost:
        raise ConfigError(
            f"{folder} is damaged: {', '.join(lost)} is missing or has changed. Delete the folder, "
            "and it will be converted again."
        )
    return folder


def _name(path: Path) -> str:
    """Turn the file's name into a valid folder name."""
    return re.sub(r"[^\w.-]+", "_", path.stem if path.suffix.lower() == ".gguf" else path.name)[:80]


def _stamp(path: Path) -> list[int]:
    """Return size, times and identity of a file, which change when it is written."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]


def _record(folder: Path) -> dict[str, Any]:
    """Read a converted folder's record of its source file; empty if there is no valid one."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(found, dict) and isinstance(found.get("files"), dict)
    return found if is_ours and found.get("format") == FORMAT else {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(
    file: GGUF, family: GGUFFamily, folder: Path, record: Mapping[str, Any], tell: Tell
) -> None:
    """Build the folder under a temporary name, and rename it when complete."""
    plan = make_plan(file, family)
    _check_room(file, folder.parent)
    tell(f"{file.path.name} is GGUF: converting it once, to {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _not_written(folder, error) from error
    try:
        rounded = fill(file, plan, beside)
        files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
        write_json(beside / RECORD, {**record, "files": files})
        _place(beside, folder)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError when a write fails
        raise _not_written(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if rounded:
        tell(f"{file.path.name}: {rounded}")


def _sweep(folder: Path) -> None:
    """Remove leftovers of conversions to this folder that were killed at least a day ago."""
    for old in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - old.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(old, ignore_errors=True)


def _not_written(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"Cannot write {folder} ({error}). Set XDG_CACHE_HOME to use a cache elsewhere."
    )


def _place(beside: Path, folder: Path) -> None:
    """Rename a finished folder; another process may have made the same one in the meantime."""
    beside.chmod(0o755)
    try:
        beside.replace(folder)
    except OSError as error:
        if not _record(folder):
            raise OSError(f"{error.strerror}; delete the existing folder") from None


def _check_room(file: GGUF, root: Path) -> None:
    """Check the disk space of the cache.

    Raises: ConfigError if there is no room for the folder.
    """
    place = root
    while not place.exists():
        place = place.parent
    # Requantised numbers take 9 bits, the others at most one bit more than in the file.
    most = sum(max(t.nbytes, t.nbytes * 9 / t.type.bits) for t in file.tensors.values()) * 1.25
    wanted, free = int(most) + SPARE_BYTES, shutil.disk_usage(place).free
    if wanted > free:
        raise ConfigError(
            f"Converting {file.path} takes up to {wanted / 1e9:.1f} GB in {root}, but its disk has "
            f"only {free / 1e9:.1f} GB free. Free some space, or set XDG_CACHE_HOME "
            "to a folder on another disk."
        )
