"""Recognises files that are no table of problems, and says what they are and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from localrl.errors import ConfigError, DataError

ARROW = (".parquet", ".arrow")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".ndjson", ".json")
ENDINGS = (*JSON, *DELIMITERS, *ARROW)
"""Endings of the files that are read as tables, in lower case."""

SHEET = "a spreadsheet. Save the sheet as CSV"
PACKED = "compressed. Unpack it first"
ARCHIVE = "an archive. Unpack it first, then name the file or the folder"
PICKLE = "a pickle. Opening one can run code, so localrl never does; save the rows as JSONL or CSV"
IMAGE = "an image. A prompt is text, so there is nothing in it to train on"
PAGE = "a web page. Download the file itself, not the page that shows it"
DOCUMENT = "a document. Write its problems as rows of a JSONL or CSV file"
MODEL = "a model file. Name it with --model, and a task with --task"
ARRAYS = "an array of numbers. Write the problems as rows of a JSONL or CSV file"
SETTINGS = "a settings file. Give it without --task: localrl train FILE.toml"
UTF16 = "UTF-16 text. Save it as UTF-8"

BY_ENDING: Mapping[str, str] = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), SHEET),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), PACKED),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z"), ARCHIVE),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"), PICKLE),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"), IMAGE),
    **dict.fromkeys((".html", ".htm"), PAGE),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".txt", ".md"), DOCUMENT),
    **dict.fromkeys((".gguf", ".safetensors"), MODEL),
    **dict.fromkeys((".npy", ".npz"), ARRAYS),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb"), "a database. Export a table as CSV"),
    ".toml": SETTINGS,
}
"""Kind of file by its ending, and advice."""

BY_START: Mapping[bytes, str] = {
    b"PK\x03\x04": "a spreadsheet or an archive. Save the sheet as CSV, or unpack it",
    b"\x1f\x8b": PACKED,
    b"BZh": PACKED,
    b"\xfd7zXZ": PACKED,
    b"\x28\xb5\x2f\xfd": PACKED,
    b"\x80\x02": PICKLE,
    b"\x80\x03": PICKLE,
    b"\x80\x04": PICKLE,
    b"\x80\x05": PICKLE,
    b"\x89PNG": IMAGE,
    b"\xff\xd8\xff": IMAGE,
    b"GIF8": IMAGE,
    b"%PDF": DOCUMENT,
    b"<!doctype html": PAGE,
    b"<!DOCTYPE html": PAGE,
    b"<html": PAGE,
    b"GGUF": MODEL,
    b"\x93NUMPY": ARRAYS,
    b"SQLite format 3": "a database. Export a table as CSV",
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
    b"version https://git-lfs": "a pointer of Git LFS, not the data. Fetch it with git lfs pull",
}
"""The same by a file's first bytes, whatever its name; Parquet and Arrow begin with others."""


def check_table(path: Path) -> None:
    """Refuse a file that cannot be a table of problems.

    Raises: ConfigError if there is no such file; DataError, saying what it is and what to do, if
    its name or its first bytes tell.
    """
    if not path.exists():
        raise ConfigError(f"There is no file {path}.{_similar(path)}")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file, so it cannot hold a table of problems.")
    ending = path.suffix.lower()
    start = _start(path)
    kind = BY_ENDING.get(ending) or next(
        (kind for bytes_, kind in BY_START.items() if start.startswith(bytes_)), None
    )
    if kind is not None:
        raise DataError(f"{path} is {kind}.")
    if not start:
        raise DataError(f"{path} is empty.")
    if ending not in ENDINGS:
        raise DataError(
            f"{path} has the ending {ending!r}, and localrl reads {', '.join(ENDINGS)}. If it is "
            "one of these, rename it."
        )
    if ending not in ARROW and start.startswith((b"PAR1", b"ARROW1")):
        name = ".parquet" if start.startswith(b"PAR1") else ".arrow"
        raise DataError(f"{path} is a {name} file. Rename it.")


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(24)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from None


def _similar(path: Path) -> str:
    """Name the most similar file in the same folder in a sentence, or return an empty string."""
    try:
        there = [p.name for p in path.parent.iterdir() if p.suffix.lower() in (*ENDINGS, ".py")]
    except OSError:
        return ""
    close = get_close_matches(path.name, there, n=1)
    if close:
        return f" Did you mean {path.with_name(close[0])}?"
    return f" {path.parent.absolute()} has {', '.join(sorted(there)[:8])}." if there else ""
