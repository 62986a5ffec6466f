"""Fetching a model, or a data set, into the Hub client's cache: data, never code."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo

from localrl.errors import HubError
from localrl.policy.files import MODEL_FILES, README
from localrl.tasks.splits import Split, choose_split

PULLED = (*MODEL_FILES, README)

SPARE_BYTES = 2**28
"""Bytes of disk space to leave free."""


@dataclass(frozen=True)
class PullPlan:
    """A planned pull, before anything is fetched. Sizes in bytes."""

    repo_id: str
    commit: str
    files: int
    total_bytes: int
    missing_bytes: int
    """Bytes not in the cache yet."""
    left_out: tuple[str, ...]
    """Names of repository files that are not fetched."""
    free_bytes: int
    """Free bytes on the disk that holds the cache."""

    @property
    def fits(self) -> bool:
        """True if the disk has room for it."""
        return not self.missing_bytes or self.missing_bytes + SPARE_BYTES <= self.free_bytes


@dataclass(frozen=True)
class ModelPullPlan(PullPlan):
    """A planned pull of a model from the Hub."""

    weights_bytes: int


@dataclass(frozen=True)
class DataPullPlan(PullPlan):
    """A planned pull of a data set from the Hub."""

    split: Split
    """The files to fetch."""


def look_at_model(api: HfApi, repo_id: str) -> ModelPullPlan:
    """Find out what pulling a model would fetch; download nothing.

    Raises: HubError if there is no such model, or it has no weights that localrl can read;
    otherwise the client's errors, see `localrl.export.hub.explained`.
    """
    try:
        info = api.model_info(repo_id, files_metadata=True)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        raise HubError(
            "The Hub has no such model, or your token may not see it. A data set is fetched with "
            f"`localrl pull --data {repo_id}`. Nothing was downloaded."
        ) from None
    sizes = _sizes(info)
    chosen = [name for name in sizes if _is_pulled(name)]
    weights = [name for name in chosen if name.endswith(".safetensors")]
    if "config.json" not in chosen or not weights:
        lacks = "weights in model*.safetensors" if "config.json" in chosen else "config.json"
        raise HubError(
            f"{repo_id} has no {lacks}, so localrl cannot load it as a model. "
            "Choose a model in MLX or Hugging Face format, not a GGUF file or an adapter."
        )
    return ModelPullPlan(
        **_plan_fields(repo_id, info, chosen, "model"),
        weights_bytes=sum(sizes[name] for name in weights),
    )


def pull_model(plan: PullPlan) -> Path:
    """Fetch the files found by `look_at_model`; resume an earlier pull that stopped.

    Returns: the folder in the cache.

    Raises: the client's errors.
    """
    return Path(snapshot_download(plan.repo_id, allow_patterns=list(PULLED)))


def look_at_data(api: HfApi, repo_id: str, part: str) -> DataPullPlan:
    """Find out what pulling a data set would fetch: the files that a task of this name opens.

    part: a table, file or folder of the data set; empty for the usual ones, see `choose_split`.

    Raises: ConfigError if there is no such part, or it is unclear which table is meant; DataError
    if there is no table; otherwise the client's errors.
    """
    info = api.dataset_info(repo_id, files_metadata=True)
    split = choose_split(_sizes(info), part, repo_id)
    return DataPullPlan(**_plan_fields(repo_id, info, split.names, "dataset"), split=split)


def pull_data(plan: DataPullPlan) -> Path:
    """Fetch the files found by `look_at_data`; resume an earlier pull that stopped.

    Returns: the folder in the cache.

    Raises: the client's errors.
    """
    names = [glob.escape(name) for name in plan.split.names]
    return Path(snapshot_download(plan.repo_id, repo_type="dataset", allow_patterns=names))


def total_memory() -> int | None:
    """Return this machine's memory in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _is_pulled(name: str) -> bool:
    # The client's own rule, in which `*` also matches folders.
    return any(fnmatch(name, pattern) for pattern in PULLED)


def _sizes(info: ModelInfo | DatasetInfo) -> dict[str, int]:
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _plan_fields(
    repo_id: str, info: ModelInfo | DatasetInfo, chosen: Sequence[str], kind: str
) -> dict[str, Any]:
    """Return the fields of `PullPlan`. The name is kept as requested, because the cache uses it."""
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
    """Return the folder, or its nearest existing parent."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
