"""Reading the header of a GGUF file: its metadata and the positions of its tensors.

A file from elsewhere is not trusted. Every count, length and offset is compared with the size of
the file before anything is allocated or repeated for it, so reading takes time and memory in
proportion to the header, which is bounded as well.
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localrl.errors import ConfigError
from localrl.gguf.types import ARRAY, NUMBERS, STRING, TENSOR_TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER = 1 << 28
"""Maximum bytes before the tensors; the largest real headers have about 20 million."""
MOST_VALUES = 3_000_000
"""Maximum metadata values including array elements; the largest vocabularies have about 1.5
million."""
MOST_STRING = 1_000_000
"""Maximum bytes of one string, the same as for a chat template in a folder."""
MOST_NAME = 256
"""Maximum bytes of a key or a tensor's name."""
MOST_TENSORS = 100_000
MOST_DIMENSIONS = 4
LEAST_TENSOR = 8 + 4 + 8 + 4 + 8
"""Minimum bytes to describe a tensor: name length, dimensions, one dimension, type, offset."""
LEAST_STRING = 8
"""Minimum bytes of a string: its length."""
LEAST_VALUE = 8 + 4 + 1
"""Minimum bytes of a metadata pair: length of its key, type, value."""
MOST_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class Tensor:
    """Position, shape and type of a tensor in a file."""

    name: str
    shape: tuple[int, ...]
    """Shape with the last dimension contiguous, as in NumPy; GGUF stores the reverse."""
    type: TensorType
    offset: int
    """Bytes from the beginning of the file."""
    nbytes: int


@dataclass(frozen=True, eq=False)
class GGUF:
    """A file whose header was read and whose tensors all lie within the file."""

    path: Path
    metadata: Mapping[str, Any]
    """Values of type int, float, bool or str; number arrays as NumPy arrays, string arrays as
    lists."""
    tensors: Mapping[str, Tensor]
    data: np.ndarray
    """The whole file as memory-mapped bytes."""

    def raw(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's bytes (rows, bytes per row) as a view of the file."""
        rows = math.prod(tensor.shape[:-1])
        return self.data[tensor.offset : tensor.offset + tensor.nbytes].reshape(rows, -1)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return the value of a key, or the default if it is absent.

        Raises: ConfigError if the value has a different type.
        """
        value = self.metadata.get(key, default)
        if value is default:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise refused(self.path, f"its {key} is {_kind_of(value)}, not {_named(kinds)}")
        return value


def is_gguf(path: Path) -> bool:
    """Detect a GGUF file by its suffix or, as for Ollama's files, by its first bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        if path.suffix.lower() == ".gguf":
            return True
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GGUF:
    """Read and check the header of a file; its tensors are memory-mapped, not read.

    Raises: ConfigError saying what is wrong with the file.
    """
    data = _mapped(path)
    cursor = _Cursor(path, data)
    tensor_count, value_count = _start(cursor)
    metadata = _metadata(cursor, value_count)
    tensors = _tensors(cursor, tensor_count, _alignment(path, metadata))
    return GGUF(path, metadata, tensors, np.frombuffer(data, np.uint8))


def refused(path: Path, reason: str) -> ConfigError:
    """Build the error for a file that violates the format."""
    return ConfigError(f"{path} is refused: {reason}.")


def _mapped(path: Path) -> mmap.mmap | bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise ConfigError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            if not path.stat().st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


class _Cursor:
    """A read position in the file, which never moves past its end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes):
        self.path = path
        self.data = data
        self.at = 0
        self.values = 0

    @property
    def left(self) -> int:
        """Maximum bytes left for the rest of the header."""
        return min(len(self.data), MOST_HEADER) - self.at

    def take(self, length: int, what: str) -> bytes:
        """Read the next bytes."""
        self.check(length, what)
        found = self.data[self.at : self.at + length]
        self.at += length
        return found

    def check(self, length: int, what: str) -> None:
        """Check that this many bytes are left.

        Raises: ConfigError if the file, or its largest allowed header, has fewer.
        """
        if length <= self.left:
            return
        if self.at + length > len(self.data):
            raise refused(
                self.path,
                f"it is truncated or damaged: {what} would need {length} bytes from byte "
                f"{self.at} on, but the file has {len(self.data)}. Fetch it again",
            )
        raise refused(self.path, f"its header is larger than {MOST_HEADER} bytes")

    def number(self, form: str, what: str) -> Any:
        """Read the next number; form: its `struct` format."""
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, most: int) -> str:
        """Read the next string, of at most `most` bytes."""
        length = self.number("<Q", what)
        if length > most:
            self.check(length, what)
            raise refused(self.path, f"{what} has {length} bytes; at most {most} are read")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise refused(self.path, f"{what} is not UTF-8 text") from None

    def count(self, number: int) -> None:
        """Count values.

        Raises: ConfigError if the total is too large.
        """
        self.values += number
        if self.values > MOST_VALUES:
            raise refused(self.path, f"it has more than {MOST_VALUES} metadata values")


def _start(cursor: _Cursor) -> tuple[int, int]:
    """Read the numbers of tensors and metadata values, checked against the file's size."""
    if cursor.data[:4] != MAGIC:
        raise refused(cursor.path, "it is not a GGUF file (it does not begin with GGUF)")
    cursor.at = 4
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise refused(cursor.path, "it is big-endian; only little-endian GGUF is supported")
        raise refused(cursor.path, f"it has GGUF version {version}; versions 2 and 3 are supported")
    tensors = cursor.number("<Q", "the number of tensors")
    values = cursor.number("<Q", "the number of metadata values")
    cursor.check(tensors * LEAST_TENSOR, f"{tensors} tensors")
    cursor.check(values * LEAST_VALUE, f"{values} metadata values")
    if tensors > MOST_TENSORS:
        raise refused(cursor.path, f"it has {tensors} tensors; at most {MOST_TENSORS} are read")
    return tensors, values


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index in range(count):
        key = cursor.text(f"the name of metadata value {index}", MOST_NAME)
        if key in found:
            raise refused(cursor.path, f"it has two values for {key!r:.80}")
        kind = cursor.number("<I", f"the type of {key!r:.80}")
        found[key] = _value(cursor, kind, f"{key!r:.80}")
    return found


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    cursor.count(1)
    if kind == STRING:
        return cursor.text(what, MOST_STRING)
    if kind == ARRAY:
        return _array(cursor, what)
    if kind not in NUMBERS:
        raise refused(cursor.path, f"{what} has the unknown type {kind}")
    if NUMBERS[kind] != "?":
        return cursor.number(NUMBERS[kind], what)
    byte = cursor.number("<B", what)
    if byte > 1:
        raise refused(cursor.path, f"{what} is neither true nor false: {byte}")
    return bool(byte)


def _array(cursor: _Cursor, what: str) -> Any:
    kind = cursor.number("<I", what)
    length = cursor.number("<Q", what)
    if kind in NUMBERS:
        form = np.dtype(NUMBERS[kind] if NUMBERS[kind] != "?" else "<B")
        cursor.check(length * form.itemsize, f"{what} with {length} values")
        cursor.count(length)
        return np.frombuffer(cursor.take(length * form.itemsize, what), form)
    if kind != STRING:  # llama.cpp does not read arrays of arrays either
        found = "arrays" if kind == ARRAY else f"the unknown type {kind}"
        raise refused(cursor.path, f"{what} is an array of {found}")
    cursor.check(length * LEAST_STRING, f"{what} with {length} values")
    cursor.count(length)
    return [cursor.text(what, MOST_STRING) for _ in range(length)]


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    is_sound = isinstance(value, int) and 8 <= value <= MOST_ALIGNMENT and value % 8 == 0
    if not is_sound or isinstance(value, bool):
        raise refused(path, f"its general.alignment is {value!r:.40}")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """Read and check descriptions of all tensors; offsets are from the beginning of the file."""
    found: dict[str, Tensor] = {}
    for index in range(count):
        name = cursor.text(f"the name of tensor {index}", MOST_NAME)
        if name in found:
            raise refused(cursor.path, f"it has two tensors named {name!r:.80}")
        found[name] = _tensor(cursor, name, alignment)
    start = -(-cursor.at // alignment) * alignment
    placed = {
        name: Tensor(name, t.shape, t.type, start + t.offset, t.nbytes) for name, t in found.items()
    }
    _check_places(cursor, placed)
    return placed


def _tensor(cursor: _Cursor, name: str, alignment: int) -> Tensor:
    what = f"the tensor {name!r:.80}"
    dimensions = cursor.number("<I", what)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise refused(cursor.path, f"{what} has {dimensions} dimensions")
    shape = [cursor.number("<Q", what) for _ in range(dimensions)]
    kind = cursor.number("<I", what)
    offset = cursor.number("<Q", what)
    if kind not in TENSOR_TYPES:
        raise refused(cursor.path, f"{what} has the unknown type {kind}")
    if not all(shape):
        raise refused(cursor.path, f"{what} is empty: {shape}")
    form = TENSOR_TYPES[kind]
    if shape[0] % form.block:
        raise refused(
            cursor.path,
            f"{what} has rows of {shape[0]} numbers in {form.name} blocks of {form.block}",
        )
    if offset % alignment:
        raise refused(cursor.path, f"{what} is at {offset}, which is not aligned to {alignment}")
    nbytes = math.prod(shape) // form.block * form.bytes
    return Tensor(name, tuple(reversed(shape)), form, offset, nbytes)


def _check_places(cursor: _Cursor, tensors: Mapping[str, Tensor]) -> None:
    """Check the positions of tensors.

    Raises: ConfigError if a tensor extends beyond the file, or two overlap.
    """
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset + tensor.nbytes > len(cursor.data):
            raise refused(
                cursor.path,
                f"it is truncated or damaged: the tensor {tensor.name!r:.80} would end at byte "
                f"{tensor.offset + tensor.nbytes}, but the file has {len(cursor.data)}. "
                "Fetch it again",
            )
        if tensor.offset < end:
            raise refused(cursor.path, f"the tensor {tensor.name!r:.80} overlaps another one")
        end = tensor.offset + tensor.nbytes


def _kind_of(value: Any) -> str:
    return "an array" if isinstance(value, np.ndarray | list) else f"{value!r:.80}"


def _named(kinds: tuple[type, ...]) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return " or ".join(names.get(kind, "an array") for kind in kinds)
