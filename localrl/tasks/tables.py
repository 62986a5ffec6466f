"""Reads the rows of one file: JSON lines, a JSON array, CSV, TSV, Parquet or Arrow."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from localrl.errors import DataError
from localrl.tasks.arrow import read_arrow
from localrl.tasks.formats import ARROW, DELIMITERS, check_table

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Rows, each with its place for messages: `file, line n`, or `file, row n`."""

OTHER_DELIMITERS = (";", "\t")
"""Separators of a CSV file whose header has no comma, as many spreadsheets write them."""
NO_SPACE = re.compile(r"\S")
LONGEST_FIELD = 2**31 - 1


def read_rows(path: Path, without: Collection[str] = ()) -> Rows:
    """Yield every row of a file with its place. without: columns that need not be read.

    Text is UTF-8, with or without a byte order mark; blank lines are skipped. All values of CSV and
    TSV are text, and an empty field is None.

    Raises: ConfigError if there is no such file, or reading it needs a package that is missing;
    DataError, naming file and line, if something cannot be read.
    """
    check_table(path)
    ending = path.suffix.lower()
    if ending in ARROW:
        return read_arrow(path, without)
    text = _text(path)
    if ending in DELIMITERS:
        return _separated(path, text, DELIMITERS[ending])
    return _array(path, text) if text.lstrip()[:1] == "[" else _lines(path, text)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    if not text.strip():
        raise DataError(f"{path} is empty: it has only blank lines.")
    return text


def _lines(path: Path, text: str) -> Rows:
    # Not splitlines(), which would also split at separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                _refuse_object(path, text)
                raise DataError(f"{place} is not JSON: {error}.") from None
            except ValueError:
                raise DataError(_told_integer(place)) from None
            except RecursionError:
                raise DataError(f"{place} is nested too deeply to read.") from None
            yield place, _object(place, row)


def _refuse_object(path: Path, text: str) -> None:
    """Raise DataError if the whole text is one JSON object, written over several lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    keys = ", ".join(map(repr, list(whole)[:8]))
    raise DataError(
        f"{path} is one JSON object with the keys {keys}. Write a list of rows, [{{...}}, ...], or "
        "one row on each line."
    )


def _array(path: Path, text: str) -> Rows:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    except ValueError:
        raise DataError(_told_integer(f"{path}, row {_unread(text)}")) from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to read.") from None
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        yield place, _object(place, row)


def _told_integer(place: str) -> str:
    return (
        f"{place} holds an integer of more than {sys.get_int_max_str_digits()} digits, which "
        "Python does not read. Write it as text, in double quotes."
    )


def _unread(text: str) -> int:
    """Return the number of the first row in a JSON array that cannot be read, counted from 1."""
    decoder, number, start = json.JSONDecoder(), 1, text.index("[") + 1
    while True:
        value = NO_SPACE.search(text, start)
        try:
            _, end = decoder.raw_decode(text, value.start() if value else start)
        except ValueError:
            return number
        number, start = number + 1, text.index(",", end) + 1


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        shown = json.dumps(row, ensure_ascii=False)[:60]
        raise DataError(f"{place} is {shown}; a row must be a JSON object {{...}}.")
    return row


def _separated(path: Path, text: str, delimiter: str) -> Rows:
    csv.field_size_limit(LONGEST_FIELD)
    lines = _fields(path, text, _delimiter(text, delimiter))
    _, header = next(lines)
    names = _names(path, header)
    for place, fields in lines:
        if len(fields) != len(names):
            raise DataError(
                f"{place} has {len(fields)} fields, but the header has {len(names)}: "
                f"{', '.join(names)}. Put text that contains a {delimiter!r} or a line break in "
                'double quotes, and write a quote inside it as "".'
            )
        yield place, {n: field or None for n, field in zip(names, fields, strict=True)}


def _delimiter(text: str, usual: str) -> str:
    header = text.lstrip().partition("\n")[0]
    return next((c for c in OTHER_DELIMITERS if usual not in header and c in header), usual)


def _fields(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields of each record that is not blank, with its place."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{place} is not {path.suffix[1:].upper()}: {error}. Is a double quote missing?"
            ) from None
        if fields:
            yield place, fields


def _names(path: Path, header: Sequence[str]) -> list[str]:
    """Return the columns' names; one without a name, as pandas writes its index, is column_N."""
    names = [name.strip() or f"column_{n}" for n, name in enumerate(header, start=1)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} has two columns named {twice[0]!r}. Rename one of them.")
    return names
