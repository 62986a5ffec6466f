"""The child's side of `worker`: reads requests from one socket, runs them, writes replies.

It is run by path in a fresh interpreter and imports the standard library only: the program that
started it is not imported again, and heavy modules load only if the called functions ask for them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import queue
import re
import resource
import socket
import struct
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Collection, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

HEADER = struct.Struct("!Q")
OUTPUT_LIMIT = 16 * 1024
TRACEBACK_LIMIT = 8000
MESSAGE_LIMIT = 300
SHOWN_LIMIT = 1000
FACTORY_CALL = re.compile(r"(.+?:[A-Za-z_][\w.]*)\((.*)\)", re.DOTALL)
NO_LIMIT = (None, resource.RLIM_INFINITY)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class NotFound(Exception):
    """Raised when the target names no function; its message is complete, so no traceback is
    sent."""


class CappedOutput(io.RawIOBase):
    """Passes the first bytes of a process's output to a file descriptor, then drops the rest."""

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
    """Load the module in a Python file, which is run once and may import its neighbours.

    Its name is one that processes started by the functions can import, as multiprocessing needs
    where it does not fork: the file's, or one of `FileFinder` if another module has that name.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    return importlib.import_module(path.stem if is_found(path) else own_name(path))


def is_found(path: Path) -> bool:
    """Return True if importing the file's name would load this very file."""
    name = path.stem
    if name in sys.modules:
        found = getattr(sys.modules[name], "__file__", None)
    else:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        found = spec.origin if spec else None
    return found is not None and Path(found).resolve() == path


def own_name(path: Path) -> str:
    """Return a module's name that no file in another folder has."""
    return f"{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{zlib.crc32(os.fsencode(path)):08x}"


class FileFinder:
    """Finds the modules that `own_name` names, in the folders that are searched anyway.

    A process that multiprocessing starts without forking runs this file again, has the same
    folders, and then imports the functions that it is to call.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the module's file, None if the name is no such name."""
        if re.fullmatch(r"\w+_[0-9a-f]{8}", name):
            for folder in map(Path, sys.path):
                for file in folder.glob("*.py"):
                    if own_name(file) == name:
                        return importlib.util.spec_from_file_location(name, file)
        return None


def load_module(name: str) -> ModuleType:
    """Import the module with a dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module missing from the user's own module is an error there, and has a traceback.
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise NotFound(f"there is no module {error.name!r}") from None
        raise


def split_call(target: str) -> tuple[str, dict[str, Any] | None]:
    """Split `module:factory(key=value)` into target and arguments; None if it has no brackets.

    Raises:
        NotFound: the arguments are not keywords with literal values.
    """
    match = FACTORY_CALL.fullmatch(target)
    if match is None:
        return target, None
    problem = f"in {target!r} the arguments are not of the form (key=value, other=value)"
    try:
        called = ast.parse(f"f({match[2]})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotFound(problem) from None
    if not isinstance(called, ast.Call) or not isinstance(called.func, ast.Name) or called.args:
        raise NotFound(problem)
    arguments: dict[str, Any] = {}
    for keyword in called.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise NotFound(problem)
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise NotFound(f"in {target!r} the value of {keyword.arg!r} is not a literal") from None
    return match[1], arguments


@functools.cache
def load(target: str) -> tuple[Callable[..., Any], tuple[inspect.Parameter, ...] | None]:
    """Return the function a target names or makes, and its parameters; None if they are unknown."""
    place, arguments = split_call(target)
    function = find(place) if arguments is None else make(find(place), target, arguments)
    return function, parameters_of(function)


def parameters_of(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...] | None:
    """Return the function's parameters; None if they are unknown."""
    try:
        return tuple(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def make(factory: Callable[..., Any], target: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    """Return the function that a factory returns for these arguments."""
    try:
        inspect.signature(factory).bind(**arguments)  # a TypeError in its body would look alike
    except TypeError as error:
        raise NotFound(f"{target!r} cannot be called: {error}") from None
    try:
        function = factory(**arguments)
    except ValueError as error:
        raise NotFound(f"{target!r} rejected its arguments: {error}") from None
    if not callable(function):
        raise NotFound(
            f"{target!r} returned a value of type {type(function).__name__}, not a function"
        )
    return function


def find(target: str) -> Callable[..., Any]:
    """Return the function that `module:function` or `path/to/file.py:function` names."""
    found = load_place(target)
    if not callable(found):
        place, _, attributes = target.rpartition(":")
        raise NotFound(
            f"{attributes!r} in {place} is of type {type(found).__name__}, not a function"
        )
    return found


def load_place(target: str) -> Any:
    """Return the object that `module:name` or `path/to/file.py:name` names."""
    place, colon, attributes = target.rpartition(":")
    if not (place and colon and attributes):
        raise NotFound(f"{target!r} is neither module:function nor path/to/file.py:function")
    is_file = place.endswith(".py")
    found: Any = load_file(Path(place).expanduser().resolve()) if is_file else load_module(place)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise NotFound(f"{place} has no {attributes!r}")
        found = getattr(found, attribute)
    return found


def signature(
    parameters: Collection[inspect.Parameter] | None,
) -> dict[str, list[str] | None]:
    """Return `required`: the required arguments; `named`: all named ones, None if it takes any."""
    named = [p for p in parameters or () if p.kind in NAMED]
    takes_any = parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {
        "required": [p.name for p in named if p.default is p.empty],
        "named": None if takes_any else [p.name for p in named],
    }


class Logbook:
    """The entries that a function logs during one call."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float]] = []
        self.extra: list[tuple[str, list[Any]]] = []

    def log_metric(self, name: str, value: float) -> None:
        """Log a number under a name."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")  # reported and dropped by the receiver
        self.metrics.append((str(name), number))

    def log_extra(self, column: str, values: Any) -> None:
        """Log one value for each completion; values that JSON cannot hold are logged as text."""
        self.extra.append((str(column), [showable(value) for value in values]))

    def entries(self) -> dict[str, Any]:
        """Return the entries as a field of the reply; empty if nothing was logged."""
        if not (self.metrics or self.extra):
            return {}
        return {"logs": {"metrics": self.metrics, "extra": self.extra}}


def showable(value: Any) -> Any:
    """Return the value if JSON can hold it, else its text."""
    try:
        json.dumps(value, default=plain)
    except (TypeError, ValueError, RecursionError, OverflowError):
        return str(value)[:SHOWN_LIMIT]
    return value


def call(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply to a call: the function's result for the arguments that the parent chose.

    Arguments named in `through` are first converted by the functions given there.
    """
    function, parameters = load(request["target"])
    kwargs = request["kwargs"]
    for name, target in request.get("through", {}).items():
        kwargs[name] = load(target)[0](kwargs[name])
    return invoke(function, parameters, kwargs, request.get("state"), wait_for)


def invoke(
    function: Callable[..., Any],
    parameters: Collection[inspect.Parameter] | None,
    kwargs: dict[str, Any],
    state: Mapping[str, Any] | None,
    wait: Callable[[Any], Any],
) -> dict[str, Any]:
    """Call a function; return its result and what it logged, as fields of the reply.

    With a `state`, the function also gets `trainer_state`, `log_extra` and `log_metric`, if it
    names them or takes any argument. wait: returns the result of an async function.
    """
    book = Logbook()
    if state is not None and parameters is not None:
        hooks = {
            "trainer_state": SimpleNamespace(**state),
            "log_extra": book.log_extra,
            "log_metric": book.log_metric,
        }
        names = {p.name for p in parameters if p.kind in NAMED}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        kwargs |= {name: hook for name, hook in hooks.items() if takes_any or name in names}
    result = function(**kwargs)
    value = wait(result) if inspect.isawaitable(result) else result
    return {"value": value, **book.entries()}


@functools.cache
def event_loop() -> Any:
    """Return the loop of all async functions: objects they keep open between calls stay usable."""
    import asyncio  # 30 ms that most calls do not need

    return asyncio.Runner()


def wait_for(awaitable: Any) -> Any:
    """Return the result of an async function."""

    async def main() -> Any:
        return await awaitable

    return event_loop().run(main())


def limit_processes(count: int | None) -> None:
    """Keep this process and all that it starts from raising the user's processes above a count."""
    limits = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = min((value for value in (count, *limits) if value not in NO_LIMIT), default=None)
    if limit is not None:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some values
            resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


def handle(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one request and return the reply."""
    match request["op"]:
        case "start":
            # The user's folder comes first, as for a script; then the parent's import path.
            sys.path[:] = [os.getcwd(), *request["sys_path"]]
            limit_processes(request["processes"])
            return {"value": os.getpid()}
        case "resolve":
            return {"value": signature(load(request["target"])[1])}
        case _:
            return call(request)


OURS = (__file__, importlib.__file__, "<frozen importlib")
"""Files whose frames say nothing about an error in the user's code."""


def describe(error: BaseException) -> dict[str, Any]:
    """Return the `Reply` fields of an exception: one line, and a traceback of the user's frames."""
    if isinstance(error, NotFound):
        return {"failure": "raised", "message": str(error)}
    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(OURS):
        frames = frames.tb_next
    details = traceback.TracebackException(type(error), error, frames)
    line = " ".join(f"{type(error).__name__}: {details}".split())
    return {
        "failure": "raised",
        "message": line[:MESSAGE_LIMIT].rstrip(": "),
        "traceback": "".join(details.format())[-TRACEBACK_LIMIT:],
    }


def plain(value: Any) -> Any:
    """Convert arrays and number types of other libraries for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__float__"):
        return float(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent as JSON")


def answer(data: bytes) -> bytes:
    """Return the encoded reply to an encoded request; never raises."""
    try:
        reply = handle(json.loads(data))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures of the call too
        reply = describe(error)
    try:
        return json.dumps(reply, default=plain).encode()
    except BaseException as error:
        return json.dumps(describe(error) | {"failure": "bad reply"}).encode()


def read_requests(connection: socket.socket, requests: queue.SimpleQueue[bytes]) -> None:
    """Feed requests to the main thread, and exit when the parent is gone, even during a call."""
    try:
        with connection.makefile("rb") as stream:
            while header := stream.read(HEADER.size):
                requests.put(stream.read(*HEADER.unpack(header)))
    finally:
        os._exit(0)


def forget(connection: socket.socket) -> None:
    """Close the descriptor, which `close` would not do while the reader's file is open."""
    if connection.fileno() >= 0:
        os.close(connection.detach())


def main() -> None:
    """Serve requests until the parent closes its end of the socket."""
    # Imports of that name must find this very module, or there would be two of each class.
    sys.modules["localrl.processes.worker_child"] = sys.modules["__main__"]
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    # A process forked by user code must neither answer for this one nor hide its death.
    os.register_at_fork(after_in_child=lambda: forget(connection))
    capped = io.BufferedWriter(CappedOutput(2, OUTPUT_LIMIT))
    output = io.TextIOWrapper(capped, encoding="utf-8", errors="replace", line_buffering=True)
    sys.stdout = sys.stderr = output

    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(connection, requests), daemon=True).start()
    while True:
        reply = answer(requests.get())
        try:
            connection.sendall(HEADER.pack(len(reply)) + reply)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)  # the parent is gone


if __name__ in ("__main__", "__mp_main__"):  # the second in a process of multiprocessing
    sys.meta_path.append(FileFinder)
if __name__ == "__main__":
    main()
