"""Files that claim to be GGUF. As a script: reads each file named to it, within limits.

It prints a line of JSON for each: how it ended, and seconds. Under a limit on its address space,
so that a file that makes the reader allocate what it claims to hold ends it with a MemoryError.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MEMORY = 256 << 20
"""Bytes beyond what the process has when everything is imported."""
U8, U32, BOOL, STRING, ARRAY, U64 = 0, 4, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def header(tensors: int, values: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values)


def one_value(kind: int, value: bytes) -> bytes:
    return header(0, 1) + pair("a", kind, value)


def one_tensor(*descriptions: bytes, data: int = 256) -> bytes:
    return header(len(descriptions), 0) + b"".join(descriptions) + bytes(data)


def array(kind: int, length: int, members: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + members


HUGE = (1 << 63, (1 << 64) - 1, 1 << 40)


def hostile() -> Iterator[tuple[str, bytes, str]]:
    """What is wrong, the file, and a part of the message."""
    yield "empty", b"", "not a GGUF"
    yield "magic", b"GGUX" + header(0, 0)[4:], "not a GGUF"
    yield "magic alone", b"GGUF", "truncated"
    yield "big endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"
    yield "version 1", header(0, 0, version=1), "version 1"
    yield "version 99", header(0, 0, version=99), "version 99"
    for huge in HUGE:
        yield f"{huge} tensors", header(huge, 0) + bytes(999), "truncated or damaged"
        yield f"{huge} values", header(0, huge) + bytes(999), "truncated or damaged"
        long = struct.pack("<Q", huge) + bytes(999)
        yield f"key of {huge}", header(0, 1) + long, "truncated or damaged"
        yield f"string of {huge}", one_value(STRING, long), "truncated or damaged"
        for kind in (U8, U64, STRING):
            members = array(kind, huge, bytes(999))
            yield f"array of {huge} of {kind}", one_value(ARRAY, members), "truncated or damaged"
        yield f"name of {huge}", header(1, 0) + long, "truncated or damaged"
        yield f"width of {huge}", one_tensor(tensor("a", (huge,))), "truncated or damaged"
        yield f"product of {huge}", one_tensor(tensor("a", (huge,) * 4)), "truncated or damaged"
        place = huge & ~31
        yield f"offset of {huge}", one_tensor(tensor("a", (4,), 0, place)), "truncated or damaged"
    yield "wrapping product", one_tensor(tensor("a", (1 << 32, 1 << 32))), "truncated or damaged"
    yield "zero rows", one_tensor(tensor("a", (4, 0))), "is empty"
    yield "no dimensions", one_tensor(tensor("a", ())), "0 dimensions"
    yield "many dimensions", one_tensor(tensor("a", (1,) * 9)), "9 dimensions"
    many = header(1, 0) + text("a") + struct.pack("<I", (1 << 32) - 1) + bytes(99)
    yield "most dimensions", many, "4294967295 dimensions"
    yield "unknown type", one_tensor(tensor("a", (4,), 77)), "unknown type 77"
    yield "part of a block", one_tensor(tensor("a", (33,), 2)), "blocks of 32"
    yield "not aligned", one_tensor(tensor("a", (4,), 0, 5)), "not aligned"
    same = tensor("a", (4,)), tensor("a", (4,), 0, 32)
    yield "same names", one_tensor(*same), "two tensors named 'a'"
    yield "overlap", one_tensor(tensor("a", (16,)), tensor("b", (4,), 0, 32)), "overlaps another"
    yield "same keys", header(0, 2) + pair("a", U8, b"1") * 2, "two values for 'a'"
    yield "unknown kind", one_value(13, b"1"), "unknown type 13"
    yield "array of unknown", one_value(ARRAY, array(13, 1, b"1")), "unknown type 13"
    yield "neither", one_value(BOOL, b"\2"), "neither true nor false"
    yield "no text", one_value(STRING, text(b"\xff\xfe")), "not UTF-8"
    yield "long template", one_value(STRING, text("x" * 10_000_000)), "10000000 bytes"
    yield "long key", header(0, 1) + pair("k" * 300, U8, b"1"), "300 bytes"
    deep = array(ARRAY, 1) * 100_000 + array(U8, 0)
    yield "deep", one_value(ARRAY, deep), "array of arrays"
    wide = array(ARRAY, 100_000, array(U8, 0) * 100_000)
    yield "many empty arrays", one_value(ARRAY, wide), "array of arrays"
    yield "many strings", one_value(ARRAY, array(STRING, 4_000_000, bytes(32_000_000))), "3000000"
    for alignment in (0, 3, 1 << 31):
        value = struct.pack("<I", alignment)
        file = header(0, 1) + pair("general.alignment", U32, value)
        yield f"alignment {alignment}", file, "alignment"
    yield "alignment of text", header(0, 1) + pair("general.alignment", STRING, text("x")), "align"


def main() -> None:
    from localrl.errors import ConfigError
    from localrl.gguf.convert import as_folder

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name in sys.argv[1:]:
        start = time.process_time()
        try:
            as_folder(Path(name), print)
            ended = "converted"
        except ConfigError as error:
            ended = str(error)
        except BaseException as error:
            ended = f"{type(error).__name__}: {error}"
        print(json.dumps([ended, time.process_time() - start]), flush=True)


if __name__ == "__main__":
    main()
