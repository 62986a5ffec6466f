"""Fetch a model, or one file of a data set, into the Hub client's cache: data, never code."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo

from localrl.errors import HubError
from localrl.export.hub import plain
from localrl.policy.files import MODEL_FILES, README

PULLED = (*MODEL_FILES, README)

SPARE_BYTES = 2**28
"""Of the disk, left free."""


@dataclass(frozen=True)
class Wanted:
    """What a pull would do, before it is done. Bytes."""

    repo_id: str
    commit: str
    files: int
    total_bytes: int
    missing_bytes: int
    """Not in the cache yet."""
    left_out: tuple[str, ...]
    """Names of the repository's files that are not taken."""
    free_bytes: int
    """Of the disk that holds the cache."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it."""
        return not self.missing_bytes or self.missing_bytes + SPARE_BYTES <= self.free_bytes


@dataclass(frozen=True)
class WantedModel(Wanted):
    """A model on the Hub."""

    weights_bytes: int


def look_at_model(api: HfApi, repo_id: str) -> WantedModel:
    """What pulling a model would fetch; downloads nothing.

    Raises: HubError when the repository holds no weights that localrl reads; otherwise what the
    client raises: see `localrl.export.hub.explained`.
    """
    info = api.model_info(repo_id, files_metadata=True)
    sizes = _sizes(info)
    chosen = [name for name in sizes if _is_pulled(name)]
    weights = [name for name in chosen if name.endswith(".safetensors")]
    if "config.json" not in chosen or not weights:
        lacks = "weights in model*.safetensors" if "config.json" in chosen else "config.json"
        raise HubError(
            f"{repo_id} holds no {lacks}, so it is no model that localrl can load. "
            "Look for one in MLX's or Hugging Face's form, and not for a GGUF or an adapter."
        )
    return WantedModel(
        **_wanted(repo_id, info, chosen, "model"),
        weights_bytes=sum(sizes[name] for name in weights),
    )


def pull_model(wanted: Wanted) -> Path:
    """Fetch what `look_at_model` has found; goes on where an earlier pull has stopped.

    Returns the folder in the cache. Raises what the client raises.
    """
    return Path(snapshot_download(wanted.repo_id, allow_patterns=list(PULLED)))


def look_at_data(api: HfApi, repo_id: str, file: str) -> Wanted:
    """What pulling one file of a data set would fetch; downloads nothing.

    Raises: HubError, naming the JSONL files that there are, when this is none of them; otherwise
    what the client raises.
    """
    info = api.dataset_info(repo_id, files_metadata=True)
    there = sorted(name for name in _sizes(info) if name.endswith(".jsonl"))
    if file not in there:
        names = plain(", ".join(there[:8])) or "none"
        raise HubError(
            f"The data set {repo_id} has no JSONL file {file!r}. JSONL files there: {names}."
        )
    return Wanted(**_wanted(repo_id, info, [file], "dataset"))


def pull_data(wanted: Wanted, file: str) -> Path:
    """Fetch what `look_at_data` has found. Returns its place in the cache."""
    found = hf_hub_download(wanted.repo_id, file, repo_type="dataset", revision=wanted.commit)
    return Path(found)


def total_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _is_pulled(name: str) -> bool:
    # The client's own rule, in which `*` takes folders too.
    return any(fnmatch(name, pattern) for pattern in PULLED)


def _sizes(info: ModelInfo | DatasetInfo) -> dict[str, int]:
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _wanted(
    repo_id: str, info: ModelInfo | DatasetInfo, chosen: Sequence[str], kind: str
) -> dict[str, Any]:
    """The fields of `Wanted`. The name is the one that was asked for: the cache goes by it."""
    sizes, commit = _sizes(info), info.sha or ""
    missing = [name for name in chosen if not _is_cached(repo_id, name, commit, kind)]
    return {
        "repo_id": repo_id,
        "commit": commit,
        "files": len(chosen),
        "total_bytes": sum(sizes[name] for name in chosen),
        "missing_bytes": sum(sizes[name] for name in missing),
        "left_out": tuple(sorted(sizes.keys() - set(chosen))),
        "free_bytes": shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE))).free,
    }


def _is_cached(repo_id: str, name: str, commit: str, kind: str) -> bool:
    found = try_to_load_from_cache(repo_id, name, revision=commit, repo_type=kind)
    return isinstance(found, str)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
