"""Chooses which files of a data set are trained on and which are held out, by their names alone.

A table is one file, or the shards of one: `train`, `main/test`. Its name is the path without the
ending and the number of the shard; in a folder that is named like a split, that of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from localrl.config import closest
from localrl.errors import ConfigError, DataError
from localrl.tasks.formats import ENDINGS

HELD_OUT = ("valid", "validation", "val", "dev", "test", "eval")
"""Names of held-out tables; the first one found is used."""
TRAIN = re.compile(r"(?<![a-zA-Z0-9])train(?:ing)?(?![a-zA-Z0-9])")
OTHER = re.compile(rf"(?<![a-zA-Z0-9])(?:{'|'.join(HELD_OUT)})(?![a-zA-Z0-9])")
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
ABOUT = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "package.json",
}  # fmt: skip
"""Files that describe data or models and are no tables."""


@dataclass(frozen=True)
class Split:
    """Names of the files to train on, and of those held out: none if rows of the first are."""

    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.train, *self.held_out)


def is_table(name: str) -> bool:
    """True if a file of this name, a path with slashes, may be a table."""
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    cache = path.name.startswith("cache-") and path.suffix == ".arrow"
    return path.suffix.lower() in ENDINGS and path.name not in ABOUT and not (hidden or cache)


def choose_split(names: Iterable[str], part: str, source: str) -> Split:
    """Choose among the files of a data set, given by their paths with slashes.

    part: a table, a file or a folder of it; empty for the whole data set, where files in folders
    are only looked at if there are none beside them. The training table is the one named train, or
    the only one; the held-out table is named alike, with a name of `HELD_OUT` in place of train.
    A table named by `part` is trained on alone. source: the data set's name, for messages.

    Raises: ConfigError if there is no such part, or it is unclear which table is meant; DataError
    if there is no table.
    """
    there = sorted(names)
    names = list(filter(is_table, there))
    if not names:
        holds = f"It holds {_list(there)}." if there else "It is empty."
        raise DataError(f"{source} has no table of problems ({', '.join(ENDINGS)}). {holds}")
    inside = [name for name in names if name.startswith(f"{part}/")]
    if part in names:
        return Split((part,))
    if part and not inside:
        return Split(_named(_tables(names), part, source))
    return _usual(_tables(_highest(inside or names)), part, source)


def _named(tables: Mapping[str, Sequence[str]], part: str, source: str) -> tuple[str, ...]:
    found = [table for table in tables if f"/{table}".endswith(f"/{part}")]
    if not found:
        raise ConfigError(
            f"{source} has no table {part!r}.{closest(part, tables)} It has {_list(tables)}."
        )
    return _only(found, tables, source)


def _usual(tables: Mapping[str, Sequence[str]], part: str, source: str) -> Split:
    names = list(tables)
    training = [name for name in names if TRAIN.search(_last(name))]
    exact = [name for name in training if _last(name) == "train"]
    others = [name for name in names if not OTHER.search(_last(name))]
    candidates = next((c for c in (exact, training, others, names) if c), names)
    files = _only(candidates, tables, source)
    held_out = next((name for name in _partners(candidates[0]) if name in tables), None)
    if held_out is None or held_out == candidates[0]:
        return Split(files)
    return Split(files, _only([held_out], tables, source))


def _partners(table: str) -> list[str]:
    """Return the names that the held-out table may have beside this training table."""
    folder, slash, last = table.rpartition("/")
    lasts = [TRAIN.sub(word, last, count=1) if TRAIN.search(last) else word for word in HELD_OUT]
    return [f"{folder}{slash}{name}" for name in lasts]


def _only(
    found: Sequence[str], tables: Mapping[str, Sequence[str]], source: str
) -> tuple[str, ...]:
    """Return the files of the only table found.

    Raises: ConfigError if there are several, or one in several formats.
    """
    files = tables[found[0]]
    formats = {PurePosixPath(name).suffix.lower() for name in files}
    if len(found) == 1 and len(formats) == 1:
        return tuple(files)
    folders = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
    if len(found) == 1:
        choices = list(files)
    else:
        choices = folders if len(folders) == len(found) and all(folders) else list(found)
    raise ConfigError(
        f"{source} has several tables to train on: {_list(choices)}. Name one of them, as in "
        f"{source}:{choices[0]}"
    )


def _tables(names: Sequence[str]) -> dict[str, list[str]]:
    tables: dict[str, list[str]] = {}
    for name in names:
        tables.setdefault(_table(name), []).append(name)
    return tables


def _table(name: str) -> str:
    folders = PurePosixPath(name).parts[:-1]
    for depth, folder in enumerate(folders, start=1):
        if TRAIN.fullmatch(folder) or OTHER.fullmatch(folder):
            return "/".join(folders[:depth])
    return "/".join((*folders, SHARD.sub("", PurePosixPath(name).stem)))


def _highest(names: Sequence[str]) -> list[str]:
    """Keep the files with the fewest folders above them."""
    least = min(name.count("/") for name in names)
    return [name for name in names if name.count("/") == least]


def _last(table: str) -> str:
    return table.rpartition("/")[2]


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
