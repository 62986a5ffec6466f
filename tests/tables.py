"""The same rows as every kind of file that a task may be."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]


def jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def array(path: Path, rows: list[Row]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def separated(path: Path, rows: list[Row], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def arrow(path: Path, rows: list[Row]) -> Path:
    """A stream, as the datasets library writes them."""
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def saved(folder: Path, rows: list[Row]) -> Path:
    """A folder as `Dataset.save_to_disk` leaves it, with an older shard and a cache in it."""
    folder.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    half = len(rows) // 2
    for name, part in zip(names, (rows[:half], rows[half:]), strict=True):
        arrow(folder / name, part)
    arrow(folder / "data-00000-of-00001.arrow", rows[:3])
    arrow(folder / "cache-0123456789abcdef.arrow", rows[:3])
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


KINDS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "rows.json": array,
    "rows.csv": separated,
    "rows.tsv": lambda path, rows: separated(path, rows, "\t"),
    "semicolons.csv": lambda path, rows: separated(path, rows, ";"),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "rows": saved,
}
