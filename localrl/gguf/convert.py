"""From a GGUF file to a folder in mlx-lm's layout, made once, in localrl's cache."""

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
from localrl.gguf.families import Family, find_family
from localrl.gguf.layout import fill, make_plan, write_json
from localrl.gguf.reader import GGUF, read_gguf
from localrl.utils.cache import cache_folder

RECORD = "gguf.json"
"""In a converted folder: which file it was made of."""
FORMAT = 1
"""Of converted folders, and in their names; one more when a file would become another folder."""
SPARE_BYTES = 1 << 28
"""Of the disk, left free."""

ABANDONED_S = 24 * 3600.0
"""After as long nobody is still converting."""

Tell = Callable[[str], None]


class WrongHash(ConfigError):
    """A file is not the one whose SHA-256 was asked for."""


def as_folder(path: Path, tell: Tell, sha256: str | None = None) -> Path:
    """The folder that a GGUF file becomes; it is made when it is not there yet.

    A file that was converted before is recognised by its size and times, else by its SHA-256. What
    is made is complete or not there at all, and the file itself is only read.

    tell: gets a line when something is made, and one when numbers had to be rounded. sha256: what
    the file's must be, where that is known.

    Raises: ConfigError when the file cannot be read as a model, or the disk has no room; WrongHash.
    """
    stamp = _stamp(path)
    root = cache_folder() / "gguf"
    name = _name(path)
    for folder in sorted(root.glob(f"{name}-*")):
        record = _record(folder)
        if record.get("stamp") == stamp and sha256 in (None, record.get("sha256")):
            return _checked(folder)
    if sha256 is not None and (found := _digest(path)) != sha256:
        raise WrongHash(f"its SHA-256 is {found}, where {sha256} was expected")
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
    """Raises: ConfigError when files of a converted folder are gone: a cache may be cleaned up."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != RECORD}
    lost = [name for name, size in _record(folder)["files"].items() if files.get(name) != size]
    if lost:
        raise ConfigError(
            f"{folder} is damaged: {', '.join(lost)} is not as it was made. Delete the folder, and "
            "it is made again."
        )
    return folder


def _name(path: Path) -> str:
    """The file's name, as far as it can be a folder's."""
    return re.sub(r"[^\w.-]+", "_", path.stem if path.suffix.lower() == ".gguf" else path.name)[:80]


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written: size, times, and which file it is."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]


def _record(folder: Path) -> dict[str, Any]:
    """What a converted folder says of its file; empty when there is no sound one."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(found, dict) and isinstance(found.get("files"), dict)
    return found if is_ours and found.get("format") == FORMAT else {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(file: GGUF, family: Family, folder: Path, record: Mapping[str, Any], tell: Tell) -> None:
    """Make the folder beside its place, and put it there when it is whole."""
    plan = make_plan(file, family)
    _check_room(file, folder.parent)
    tell(f"{file.path.name} is GGUF: converting it once, into {folder}")
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
    except (OSError, RuntimeError) as error:  # MLX's own when it writes a file
        raise _not_written(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if rounded:
        tell(f"{file.path.name}: {rounded}")


def _sweep(folder: Path) -> None:
    """Remove what a conversion to this folder left behind that was killed a day ago or earlier."""
    for old in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - old.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(old, ignore_errors=True)


def _not_written(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be written ({error}). XDG_CACHE_HOME names the folder that holds it."
    )


def _place(beside: Path, folder: Path) -> None:
    """Rename a finished folder; another process may have made the same one meanwhile."""
    beside.chmod(0o755)
    try:
        beside.replace(folder)
    except OSError as error:
        if not _record(folder):
            raise OSError(f"{error.strerror}; delete what is there") from None


def _check_room(file: GGUF, root: Path) -> None:
    """Raises: ConfigError when the disk of the cache has no room for the folder."""
    place = root
    while not place.exists():
        place = place.parent
    # Numbers that are quantised anew take 9 bits, the others at most one bit more than in the file.
    most = sum(max(t.nbytes, t.nbytes * 9 / t.type.bits) for t in file.tensors.values()) * 1.25
    wanted, free = int(most) + SPARE_BYTES, shutil.disk_usage(place).free
    if wanted > free:
        raise ConfigError(
            f"Converting {file.path} takes up to {wanted / 1e9:.1f} GB in {root}, and its disk has "
            f"{free / 1e9:.1f} GB free. Make room, or set XDG_CACHE_HOME to a folder on another."
        )
