"""Resolution of --model arguments to folders on this machine, without the network."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from localrl.embedded import EMBEDDED_MODELS, embedded_model_path
from localrl.errors import ConfigError
from localrl.gguf.convert import WrongHash, as_folder
from localrl.gguf.reader import is_gguf
from localrl.policy.files import MODEL_FILES
from localrl.policy.folder import hub_name
from localrl.utils.packaged import PACKAGED_MODELS, PackagedModel, other_file, packaged_file

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def find_model(name: str | None, tell: Callable[[str], None] = _tell) -> Path:
    """Find the folder of a model given by path or name.

    A name is that of an embedded model, of one shipped in a package, or `user/name` in the Hub's
    cache. None means the default embedded model. An existing folder takes precedence. A GGUF file
    is converted once to a folder in localrl's cache. The Hub's cache is only read: the network is
    never used.

    tell: called with a line when a GGUF file is converted.

    Raises: ConfigError if the model is not on this machine, or a GGUF file cannot be read.
    """
    if name is None:
        return embedded_model_path()
    folder = Path(name).expanduser()
    if name in EMBEDDED_MODELS and not folder.is_dir():
        return embedded_model_path(name)
    if name in PACKAGED_MODELS and not folder.is_dir():
        return packaged_folder(PACKAGED_MODELS[name], tell)
    if is_gguf(folder):
        return as_folder(folder, tell)
    if folder.suffix.lower() == ".gguf" and not folder.exists():
        raise ConfigError(f"The file {folder} does not exist.")
    if folder.is_dir() or not _HUB_NAME.fullmatch(name):
        return folder
    found = _cached(name)
    if found is not None:
        return found
    raise ConfigError(
        f"The model {name!r} is not on this machine: there is no such folder, and it is not "
        f"complete in the Hub's cache. Fetch it with `localrl pull {name}`."
    )


def shown_name(name: str | None, folder: Path) -> str:
    """Return what to call a model in front of people: the name it was given by, without folders.

    folder: where `find_model` found it, which may be a folder of a cache, called by a hash.
    """
    if name is None:
        return folder.name
    given = Path(os.path.abspath(Path(name).expanduser()))
    return name if not given.exists() else hub_name(given) or given.name


def packaged_folder(model: PackagedModel, tell: Callable[[str], None] = _tell) -> Path:
    """Return the folder in localrl's cache converted, once, from a packaged model's GGUF.

    Raises: ConfigError if the GGUF is not on this machine, or differs from the known file.
    """
    path = packaged_file(model)
    try:
        return as_folder(path, tell, model.file_sha256)
    except WrongHash as error:
        raise other_file(model, path, str(error)) from None


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(name, local_files_only=True, allow_patterns=list(MODEL_FILES))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return Path(found)
