"""Reads Parquet and Arrow files with pyarrow, which only these need (the extra `data`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from localrl.errors import ConfigError, DataError

INSTALL = "pip install 'localrl[data]'"


def read_arrow(path: Path, without: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every row of a Parquet or Arrow file with its place, `file, row n`.

    Dates, times and decimals become text. The columns named in `without` are not read.

    Raises: ConfigError if pyarrow is not installed; DataError if the file is damaged, or a column
    holds bytes.
    """
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise ConfigError(f"Reading {path} needs pyarrow. Install it: {INSTALL}") from None
    number = 0
    try:
        for batch in _batches(path, without):
            for row in batch.to_pylist():
                number += 1
                place = f"{path}, row {number}"
                yield place, {name: _plain(place, name, value) for name, value in row.items()}
    except (ArrowException, OSError, ValueError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"Cannot read {path} after {number} rows: {told}. Is the file complete?"
        ) from None


def _batches(path: Path, without: Collection[str]) -> Iterator[Any]:
    """Yield record batches of a Parquet file, or of an Arrow file or stream."""
    from pyarrow import ipc, memory_map
    from pyarrow.parquet import ParquetFile

    if path.suffix.lower() == ".parquet":
        with ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name not in without]
            yield from file.iter_batches(columns=wanted, use_threads=False)
        return
    with memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        opened = ipc.open_file(source) if is_file else ipc.open_stream(source)
        count = opened.num_record_batches if is_file else None
        batches = map(opened.get_batch, range(count)) if count is not None else opened
        for batch in batches:
            yield batch.drop_columns([name for name in batch.schema.names if name in without])


def _plain(place: str, column: str, value: Any) -> Any:
    """Return a value as JSON has it. Raises: DataError for bytes and other kinds."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(place, column, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(place, column, item) for key, item in value.items()}
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, timedelta)):
        return str(value)
    kind = "bytes, an image perhaps" if isinstance(value, bytes) else f"a {type(value).__name__}"
    raise DataError(
        f"{place}: the column {column!r} holds {kind}, which neither a prompt nor a reward can "
        f"use. Leave it out with --columns {column}="
    )
