"""Finds the files of the user's data: a file, a folder, or a data set in the Hub's cache."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localrl.errors import ConfigError, DataError
from localrl.tasks.formats import BY_ENDING, ENDINGS, check_table
from localrl.tasks.splits import Split, choose_split

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEPTH = 3
"""Number of folders below one another in which tables are looked for."""
MOST_FILES = 20_000


@dataclass(frozen=True)
class Source:
    """The files of a task: those to train on, and those held out, if they are apart."""

    name: str
    """The task's name: that of the file or folder, or of the data set on the Hub."""
    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()


def find_source(name: str) -> Source:
    """Find the files that a name stands for: a path, or user/name of a data set on the Hub.

    A folder or a data set may be followed by a colon and the part to use: data/:test,
    user/name:main, see `splits.choose_split`. The Hub's cache is only read, never the network.

    Raises: ConfigError if there is nothing of that name, or it is unclear which table is meant;
    DataError if what is there is no table of problems.
    """
    path = Path(name).expanduser()
    folder, _, part = name.partition(":")
    if path.is_dir():
        return _in_folder(path, "", name)
    if not path.exists() and Path(folder).expanduser().is_dir():
        return _in_folder(Path(folder).expanduser(), part, folder)
    if not path.exists() and _may_be_on_the_hub(folder):
        return _in_cache(folder, part)
    check_table(path)
    return Source(path.stem, (path,))


def _may_be_on_the_hub(name: str) -> bool:
    ending = Path(name).suffix.lower()
    return HUB_NAME.fullmatch(name) is not None and ending not in (*ENDINGS, ".py", *BY_ENDING)


def _in_folder(folder: Path, part: str, name: str) -> Source:
    """Find the files in a folder. name: how it was given, for messages."""
    _refuse_others(folder)
    own = Path(os.path.abspath(folder)).stem + (f":{part}" if part else "")
    saved = folder / part
    if (saved / "state.json").is_file():
        return Source(own, _saved(saved))
    return _source(folder, choose_split(_listing(folder), part, name), own)


def _source(folder: Path, split: Split, name: str) -> Source:
    train, held_out = (_paths(folder, names) for names in (split.train, split.held_out))
    return Source(name, train, held_out)


def _paths(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the files of a table; of a split saved by `datasets`, those that it lists."""
    parents = {(folder / name).parent for name in names}
    if len(parents) == 1 and ((parent := parents.pop()) / "state.json").is_file():
        return _saved(parent)
    return tuple(folder / name for name in names)


def _saved(folder: Path) -> tuple[Path, ...]:
    """Return the files of a table that `Dataset.save_to_disk` wrote, in order.

    Its folder may hold older shards and caches too, which state.json does not list.
    """
    try:
        listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
        files = tuple(folder / Path(file["filename"]).name for file in listed)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder / 'state.json'} is not what save_to_disk of the datasets library writes. "
            "Save the data set again."
        ) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(
            f"{folder} lacks {missing[0] if missing else 'all files'}, which its state.json lists. "
            "Copy the whole folder, or save the data set again."
        )
    return files


def _listing(folder: Path) -> list[str]:
    """List the files in a folder and up to `DEPTH` - 1 folders below, as paths with slashes."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        found += [(below / file).as_posix() for file in files]
        if len(found) > MOST_FILES:
            raise ConfigError(f"{folder} holds more than {MOST_FILES} files. Name one of them.")
        deep = len(below.parts) + 1 >= DEPTH
        folders[:] = [] if deep else [f for f in folders if not f.startswith((".", "_"))]
    return found


def _refuse_others(folder: Path) -> None:
    if (folder / "metrics.jsonl").is_file() and (folder / "run.json").is_file():
        raise ConfigError(
            f"{folder} is a run of localrl, not a task. Look at it with localrl show {folder}"
        )
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} is a model. Name it with --model, and a task with --task.")


def _in_cache(name: str, part: str) -> Source:
    """Find a data set in the Hub's cache.

    Raises: ConfigError, naming the command that fetches it, if it is not there or not complete.
    """
    place = f"{name}:{part}" if part else name
    fetch = f"Fetch it with `localrl pull --data {place}`."
    folder = _snapshot(name)
    if folder is None:
        raise ConfigError(
            f"There is no file or folder {name}, and no data set of that name in the Hub's cache. "
            f"{fetch}"
        )
    known = _known(name, folder)
    try:
        split = choose_split(_listing(folder) if known is None else known, part, name)
    except (ConfigError, DataError) as error:
        more = f" If the Hub has more: {fetch}" if known is None else ""
        raise type(error)(f"{error}{more}") from None
    missing = [file for file in split.names if not (folder / file).is_file()]
    if missing:
        raise ConfigError(
            f"The data set {place} is not complete in the Hub's cache: {missing[0]} is missing. "
            f"{fetch}"
        )
    return _source(folder, split, place)


def _snapshot(name: str) -> Path | None:
    """Return the folder of the version that the cache calls main, or of the only one."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    main = cache / "refs" / "main"
    if main.is_file():
        folder = cache / "snapshots" / main.read_text().strip()
        return folder if folder.is_dir() else None
    versions = list((cache / "snapshots").glob("*/"))
    return versions[0] if len(versions) == 1 else None


def _known(name: str, folder: Path) -> list[str] | None:
    """List the data set's files on the Hub, as fetching remembered them; None if it did not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(name, repo_type="dataset", revision=folder.name)
    except CachedRepoTreeNotFoundError:
        return None
    return [file.path for file in tree]
