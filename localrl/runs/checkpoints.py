"""Checkpoints: folders that are either complete or absent, however the process ends.

    checkpoints/step-000100/    published by one rename, once every byte is on the disk
        manifest.json           written last: size and SHA-256 of each other file
    checkpoints/.tmp-…          being written or pruned; removed at the next start
    checkpoints/unused-step-…   newer than where a run was continued, see `set_aside`

A checkpoint that exists can be loaded; if the disk damages one all the same, its checksums show it,
and the previous one is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from localrl.errors import CheckpointError
from localrl.runs.logs import sync_folder, to_json

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{6,})")
SPARE = 2
"""Free disk space required before writing, as a multiple of the checkpoint's size."""

Write = Callable[[Path], None]
"""Writes one file of a checkpoint to the given path."""


class Checkpoints:
    """The checkpoints of one run; the caller holds the run's lock."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn

    def save(self, step: int, files: Mapping[str, Write], size: int) -> Path:
        """Publish the checkpoint of a step, made of named files; `size` is their approximate bytes.

        Raises: CheckpointError if it cannot be written; earlier ones stay unchanged.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".tmp-{step:06d}-{os.getpid()}"
        try:
            self.folder.mkdir(exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < SPARE * size:
                raise OSError(f"{free} bytes are free, but {SPARE * size} are needed")
            _discard(temporary)
            temporary.mkdir()
            entries = {name: _written(temporary / name, write) for name, write in files.items()}
            manifest = {"format": FORMAT, "step": step, "files": entries}
            _write(temporary / MANIFEST, to_json(manifest, indent=2), last=True)
            sync_folder(temporary)
            if final.exists():
                self._trash(final)
            temporary.rename(final)
            sync_folder(self.folder)
        # MLX raises RuntimeError if a file cannot be written.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                _discard(temporary)
            raise CheckpointError(
                f"The checkpoint of step {step} cannot be written in {self.folder}: {error}. Free "
                "some disk space; earlier checkpoints are intact."
            ) from error
        return final

    def newest(self) -> Path | None:
        """Return the newest intact checkpoint; None if there is none. Warns about damaged ones.

        Raises: CheckpointError if there are some, but all are damaged.
        """
        return next(self.intact(), None)

    def intact(self) -> Iterator[Path]:
        """Yield the intact checkpoints, the newest first. Warns about damaged ones among them.

        Raises: CheckpointError if there are some, but all are damaged.
        """
        steps, found = self.steps(), False
        for step in reversed(steps):
            path = self.folder / f"step-{step:06d}"
            problem = damage(path)
            if problem is None:
                found = True
                yield path
            else:
                self._warn(f"The checkpoint {path} is damaged: {problem}. Using the previous one.")
        if steps and not found:
            raise CheckpointError(
                f"All {len(steps)} checkpoints in {self.folder} are damaged, so the run cannot "
                "continue. Start it again with another --out."
            )

    def set_aside(self, steps: Iterable[int]) -> list[Path]:
        """Rename the checkpoints of these steps, so that they are kept but no longer used."""
        found = []
        for step in steps:
            name = f"unused-step-{step:06d}"
            names = (name if n == 1 else f"{name}-{n}" for n in count(1))
            free = next(path for name in names if not (path := self.folder / name).exists())
            (self.folder / f"step-{step:06d}").rename(free)
            found.append(free)
        return found

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def prune(self, keep: Collection[int]) -> None:
        """Remove the checkpoints of all other steps."""
        for step in self.steps():
            if step not in keep:
                self._trash(self.folder / f"step-{step:06d}")

    def sweep(self) -> None:
        """Remove everything that an earlier process left partly written or partly pruned."""
        for path in self.folder.glob(".tmp-*"):
            _discard(path)

    def _trash(self, path: Path) -> None:
        """Remove a checkpoint: renames it first, because a partly removed one must not be seen."""
        trash = self.folder / f".tmp-trash-{path.name}-{os.getpid()}"
        _discard(trash)
        path.rename(trash)
        _discard(trash)


def damage(path: Path) -> str | None:
    """Return the problem with a checkpoint, naming the file; None if it is intact."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files, form = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if form != FORMAT:
        return f"it has format {form}, but this version reads {FORMAT}"
    for name, entry in files.items():
        try:
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} does not have its original {entry['bytes']} bytes"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _written(path: Path, write: Write) -> dict[str, Any]:
    """Write a file, sync it to disk, and return its size and hash."""
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _write(path: Path, data: bytes, *, last: bool) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        # On macOS fsync leaves data in the drive's cache; one full sync at the end is enough.
        full_sync = getattr(fcntl, "F_FULLFSYNC", None)
        if last and full_sync is not None:
            fcntl.fcntl(file.fileno(), full_sync)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
