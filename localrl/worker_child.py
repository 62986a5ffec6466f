"""The child's side of `localrl.worker`: reads requests from one socket, runs them, writes replies.

It is run by its path in a fresh interpreter and imports the standard library only: the program that
started it is not imported again, and nothing heavy is loaded but what the called functions ask for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import queue
import socket
import struct
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

HEADER = struct.Struct("!Q")
OUTPUT_LIMIT = 16 * 1024
TRACEBACK_LIMIT = 8000
MESSAGE_LIMIT = 300
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class NotFound(Exception):
    """The target names no function; its message says everything, so no traceback is sent."""


class CappedOutput(io.RawIOBase):
    """Lets the first bytes of a process's output through to a file descriptor, then drops them."""

    def __init__(self, fd: int, limit: int) -> None:
        self._fd = fd
        self._left = limit

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any, /) -> int:
        shown = bytes(data[: self._left])
        if shown:
            self._left -= len(shown)
            note = b"" if self._left else b"\n[localrl: further output is dropped]\n"
            try:
                os.write(self._fd, shown + note)
            except OSError:
                self._left = 0  # a closed terminal must not fail the user's function
        return len(data)


def load_file(path: Path) -> ModuleType:
    """The module in a Python file, which may import its neighbours."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    name = f"{path.stem}_{zlib.crc32(os.fsencode(path)):08x}"  # two folders may hold one file name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotFound(f"{path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_module(name: str) -> ModuleType:
    """The module with a dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that the user's own module misses is an error in that module, with a traceback.
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise NotFound(f"there is no module {error.name!r}") from None
        raise


@functools.cache
def load(target: str) -> tuple[Callable[..., Any], tuple[inspect.Parameter, ...] | None]:
    """The function a target names and its parameters; None when Python cannot tell them."""
    place, colon, attributes = target.rpartition(":")
    if not (place and colon and attributes):
        raise NotFound(f"{target!r} is neither module:function nor path/to/file.py:function")
    is_file = place.endswith(".py")
    found: Any = load_file(Path(place).expanduser().resolve()) if is_file else load_module(place)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise NotFound(f"{place} has no {attributes!r}")
        found = getattr(found, attribute)
    if not callable(found):
        raise NotFound(
            f"{attributes!r} in {place} is no function but of type {type(found).__name__}"
        )
    try:
        return found, tuple(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return found, None


def required(target: str) -> list[str]:
    """Names of the arguments without which the function cannot be called."""
    parameters = load(target)[1] or ()
    return [p.name for p in parameters if p.kind in NAMED and p.default is p.empty]


def call(target: str, kwargs: Mapping[str, Any]) -> Any:
    """Result of the function for those of `kwargs` that it names, or all if it takes **kwargs."""
    function, parameters = load(target)
    if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters if p.kind in NAMED}
        kwargs = {name: value for name, value in kwargs.items() if name in names}
    result = function(**kwargs)
    return wait_for(result) if inspect.isawaitable(result) else result


def wait_for(awaitable: Any) -> Any:
    """The result of an async function."""
    import asyncio  # 30 ms that most calls do not need

    async def main() -> Any:
        return await awaitable

    return asyncio.run(main())


def handle(request: Mapping[str, Any]) -> Any:
    """Does what one request asks; the result is the reply's value."""
    match request["op"]:
        case "start":
            # The folder of the user comes first, as for a script; then what the parent can import.
            sys.path[:] = [os.getcwd(), *request["sys_path"]]
            return os.getpid()
        case "resolve":
            return required(request["target"])
        case _:
            return call(request["target"], request["kwargs"])


def describe(error: BaseException) -> dict[str, Any]:
    """The fields of a `Reply` for an exception: one line, and a traceback of the user's frames."""
    if isinstance(error, NotFound):
        return {"failure": "raised", "message": str(error)}
    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    details = traceback.TracebackException(type(error), error, frames)
    line = " ".join(f"{type(error).__name__}: {details}".split())
    return {
        "failure": "raised",
        "message": line[:MESSAGE_LIMIT].rstrip(": "),
        "traceback": "".join(details.format())[-TRACEBACK_LIMIT:],
    }


def plain(value: Any) -> Any:
    """JSON's view of arrays and number types of other libraries."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__float__"):
        return float(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent as JSON")


def answer(data: bytes) -> bytes:
    """The encoded reply to an encoded request; never raises."""
    try:
        reply = {"value": handle(json.loads(data))}
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures of the call too
        reply = describe(error)
    try:
        return json.dumps(reply, default=plain).encode()
    except BaseException as error:
        return json.dumps(describe(error) | {"failure": "bad reply"}).encode()


def read_requests(connection: socket.socket, requests: queue.SimpleQueue[bytes]) -> None:
    """Feeds the main thread, and ends the process once the parent is gone, even during a call."""
    try:
        with connection.makefile("rb") as stream:
            while header := stream.read(HEADER.size):
                requests.put(stream.read(*HEADER.unpack(header)))
    finally:
        os._exit(0)


def forget(connection: socket.socket) -> None:
    """Closes the descriptor, which `close` would not while the reader's file is open."""
    if connection.fileno() >= 0:
        os.close(connection.detach())


def main() -> None:
    """Serves requests until the parent closes its end of the socket."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    # A process forked by user code must neither answer for us nor hide our death from the parent.
    os.register_at_fork(after_in_child=lambda: forget(connection))
    capped = io.BufferedWriter(CappedOutput(2, OUTPUT_LIMIT))
    output = io.TextIOWrapper(capped, encoding="utf-8", errors="replace", line_buffering=True)
    sys.stdout = sys.stderr = output

    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(connection, requests), daemon=True).start()
    while True:
        reply = answer(requests.get())
        connection.sendall(HEADER.pack(len(reply)) + reply)


if __name__ == "__main__":
    main()
