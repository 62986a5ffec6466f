"""Wheels with a model inside, made in a moment, and what pip is told to find them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from localrl.utils.packaged import PackagedModel

NAME, VERSION = "localrl_tiny_package", "0.3.1"


def make_wheel(folder: Path, gguf: bytes) -> PackagedModel:
    """A wheel with this file below the folder, and what the table would say of it.

    Its code must never run: it ends the process.
    """
    file, info = f"{NAME}/tiny.gguf", f"{NAME}-{VERSION}.dist-info"
    inside = {
        file: gguf,
        f"{NAME}/__init__.py": b"raise SystemExit('imported')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
        "Requires-Dist: no-such-package\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*inside, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{NAME}-{VERSION}-py3-none-any.whl"
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        for name, data in [*inside.items(), (f"{info}/RECORD", record.encode())]:
            archive.writestr(name, data)
    data = wheel.read_bytes()
    return PackagedModel(
        name="tiny-packaged",
        distribution=NAME.replace("_", "-"),
        version=VERSION,
        wheel=wheel.name,
        wheel_bytes=len(data),
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        file=file,
        file_bytes=len(gguf),
        file_sha256=hashlib.sha256(gguf).hexdigest(),
        licence="Apache-2.0",
        base_id="acme/tiny",
        quantization={},
    )


def unpack(wheel: Path, site: Path) -> Path:
    """Install a wheel as pip does, but for its caches; returns `site`."""
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@contextmanager
def only_from(wheels: Path | None, cache: Path) -> Iterator[None]:
    """pip finds what is in a folder and no index; localrl's cache is another."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        if wheels is not None:
            patch.setenv("PIP_FIND_LINKS", str(wheels))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


def files_below(folder: Path) -> list[Path]:
    """All files below a folder; none where it is not there."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())
