"""A child process that calls Python functions under a time and a memory limit.

Code that may hang, crash or exhaust memory (reward functions, chat templates, environments) runs in
a `Worker`, so that in the worst case it costs one call. The child is a fresh interpreter with one
private socket; messages are length-prefixed JSON, never pickle, because the child's output is not
trusted. This guards against accidents; it is not a sandbox against malice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from localrl.errors import DataError
from localrl.processes.process_limit import family, tasks_of_user, worker_room
from localrl.processes.worker_child import HEADER, plain

FailureKind = Literal["raised", "timeout", "memory", "processes", "died", "bad reply"]

REPLY_LIMIT = 1 << 28
CHUNK = 1 << 20
# Reading /proc takes microseconds; elsewhere `ps` must be started, which takes milliseconds.
MEMORY_POLL_S = 0.02 if Path("/proc/self/statm").exists() else 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """The result of one call: a value, or the kind of failure and its reason."""

    value: Any = None
    failure: FailureKind | None = None
    message: str = ""
    """One-line description of the failure."""
    traceback: str | None = None
    """Traceback of the user's frames, if their code raised."""
    logs: Mapping[str, Any] = field(default_factory=dict)
    """Entries logged by the function, if any: `metrics`, pairs of a name and a number, and `extra`,
    pairs of a column's name and its values. Not checked."""

    @property
    def ok(self) -> bool:
        """True if there is a value."""
        return self.failure is None


class _Failed(Exception):
    """Raised when the child can no longer be used."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.reply = Reply(failure=kind, message=message)


class Worker:
    """Calls functions in a child process that is started on demand and killed when necessary.

    Use it as a context manager; leaving it kills the child. Not thread-safe.

    time_limit_s: for one call. Starting the child and importing the function's module do not
        count; each of them may take `start_limit_s`.
    memory_limit_bytes: resident memory of the child itself, checked every few milliseconds while
        a call runs; None for no limit. Processes that the function starts are not counted.

    The child and all that it starts may be some thousand processes, enough for pools. The kernel
    enforces this for every user but root; for root it is checked, on Linux, while a call runs.
    """

    def __init__(
        self,
        *,
        time_limit_s: float,
        memory_limit_bytes: int | None,
        start_limit_s: float = 60.0,
    ) -> None:
        self.time_limit_s = time_limit_s
        self.memory_limit_bytes = memory_limit_bytes
        self.start_limit_s = start_limit_s
        self._child: _Child | None = None
        self._signatures: dict[str, Mapping[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(
        self,
        target: str,
        kwargs: Mapping[str, Any],
        *,
        state: Mapping[str, Any] | None = None,
        through: Mapping[str, str] | None = None,
        limit_s: float | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Call `module:function` or `path/to/file.py:function` in the child.

        With brackets, `module:factory(key=value)` names the function that the factory returned when
        called once with these literals. The function gets the keyword arguments that it names, or
        all if it takes **kwargs; no others are sent. An async function is awaited, always in the
        same loop. Values travel as JSON: tuples become lists, keys become text, arrays become
        lists; None, NaN and infinity arrive unchanged. Failures of any kind are returned in the
        reply.

        state: offers the function three more arguments: `trainer_state`, an object with these
            attributes, and the functions `log_extra` and `log_metric`, see `Reply.logs`.
        through: maps an argument's name to a function of the child that converts it first:
            a way to reach objects that live there.
        limit_s: time limit of this call, instead of `time_limit_s`.
        waiting: called several times a second until the answer comes; what it raises ends the call.

        Raises:
            DataError: a required argument cannot be sent as JSON.
        """
        resolved = self.resolve(target)
        if not resolved.ok:
            return resolved
        given = {name: kwargs[name] for name in kwargs if self._named(target, name)}
        made = {name: by for name, by in (through or {}).items() if name in given}
        message = encode_call(target, given, state, made)
        return self._request(message, limit_s or self.time_limit_s, waiting)

    def wants(self, target: str, name: str) -> bool:
        """Return True if the function would be given an argument of this name, or is not known."""
        return not self.resolve(target).ok or self._named(target, name)

    def _named(self, target: str, name: str) -> bool:
        named = self._signatures[target]["named"]
        return named is None or name in named

    def resolve(self, target: str) -> Reply:
        """Import the function; the value is the list of its required arguments.

        A failure without a traceback means that there is no such module, file or function.
        """
        if self._child is not None and self._child.gone():
            self.close()
        if self._child is None:
            started = self._start()
            if not started.ok:
                return started
        if target not in self._signatures:
            reply = self._request(_encode({"op": "resolve", "target": target}), self.start_limit_s)
            if not reply.ok:
                return reply
            self._signatures[target] = reply.value
        return Reply(value=self._signatures[target]["required"])

    def failure(self) -> Reply | None:
        """Check the child and its limits between calls, for what functions left at work in it.

        Returns the failure if there is one: the child has then been killed.
        """
        if self._child is None:
            return Reply(failure="died", message="its process is gone")
        try:
            self._child.check()
        except _Failed as failed:
            self.close()
            return failed.reply
        return None

    def close(self) -> None:
        """Kill the child and its whole process group; the next call starts another one."""
        if self._child is not None:
            self._child.kill()
            self._child = None
        self._signatures.clear()

    def _start(self) -> Reply:
        try:
            self._child = _Child(self.memory_limit_bytes)
        except OSError as error:
            return Reply(failure="died", message=f"its process could not be started: {error}")
        tasks = tasks_of_user()
        limit = None if tasks is None else tasks + worker_room()
        message = {"op": "start", "sys_path": sys.path, "processes": limit}
        return self._request(_encode(message), self.start_limit_s)

    def _request(
        self, data: bytes, limit_s: float, waiting: Callable[[], None] = lambda: None
    ) -> Reply:
        assert self._child is not None
        try:
            return _decode(self._child.exchange(data, limit_s, waiting))
        except _Failed as failed:
            self.close()
            return failed.reply
        except BaseException:
            self.close()  # otherwise its answer could be taken for that of a later call
            raise


class _Child:
    """The process and the parent's end of its socket."""

    def __init__(self, memory_limit_bytes: int | None) -> None:
        self._memory_limit = memory_limit_bytes
        self._process_limit = worker_room()
        self._next_poll = 0.0
        self._waiting: Callable[[], None] = lambda: None
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        script = Path(__file__).with_name("worker_child.py")
        try:
            # Started by path, so that neither the user's `__main__` nor a module that happens to
            # be in the current folder is imported. In its own session: Ctrl-C is for the parent.
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def exchange(self, data: bytes, limit_s: float, waiting: Callable[[], None]) -> bytes:
        """Send one message and return the answer.

        Raises: _Failed if there is none.
        """
        deadline, self._waiting = time.monotonic() + limit_s, waiting
        try:
            self._send(HEADER.pack(len(data)) + data, deadline, limit_s)
            (size,) = HEADER.unpack(self._receive(HEADER.size, deadline, limit_s))
            if size > REPLY_LIMIT:
                raise _Failed("bad reply", f"answered with {size} bytes; {REPLY_LIMIT} are allowed")
            return self._receive(size, deadline, limit_s)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise _Failed("died", f"its process {self.kill()}") from None

    def check(self) -> None:
        """Raise _Failed if the child has died or uses too much."""
        if self.gone():
            raise _Failed("died", f"its process {self.kill()}")
        self._check_use()

    def gone(self) -> bool:
        """Return True if the child has died, or sent something unasked, since the last answer."""
        return bool(self._selector.select(0))

    def kill(self) -> str:
        """Kill the process group, release everything, and describe how the process had ended."""
        self._selector.close()
        self._socket.close()
        if self._process.returncode is None:  # once reaped, its pid may belong to another process
            # It may be gone already; macOS refuses to signal a group of zombies.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    def _send(self, data: bytes, deadline: float, limit_s: float) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                self._wait(selectors.EVENT_WRITE, deadline, limit_s)

    def _receive(self, size: int, deadline: float, limit_s: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(selectors.EVENT_READ, deadline, limit_s)
            try:
                piece = self._socket.recv(min(size - len(data), CHUNK))
            except BlockingIOError:
                continue
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait(self, event: int, deadline: float, limit_s: float) -> None:
        """Wait until the socket is ready; data that has arrived counts even after the deadline."""
        self._selector.modify(self._socket, event)
        while True:
            self._check_use()
            self._waiting()
            left = deadline - time.monotonic()
            if self._selector.select(min(max(left, 0.0), MEMORY_POLL_S)):
                return
            if left <= 0:
                raise _Failed("timeout", f"gave no answer within the limit of {limit_s:g} s")

    def _check_use(self) -> None:
        now = time.monotonic()
        if now < self._next_poll:
            return
        self._next_poll = now + MEMORY_POLL_S
        if len(family(self._process.pid, self._process_limit)) >= self._process_limit:
            raise _Failed("processes", f"started more than {self._process_limit} processes")
        if self._memory_limit is not None:
            self._check_memory(self._memory_limit)

    def _check_memory(self, limit: int) -> None:
        used = resident_bytes(self._process.pid)
        if used is None:
            self._memory_limit = None
            logger.warning("this system does not report a process's memory: no limit is set")
        elif used > limit:
            used_mb, limit_mb = used / 1e6, limit / 1e6
            raise _Failed("memory", f"used {used_mb:.0f} MB; the limit is {limit_mb:.0f} MB")


def resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process in bytes, or None if the system does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _resident_bytes_by_ps(pid)


def _resident_bytes_by_ps(pid: int) -> int | None:
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return int(result.stdout) * 1024
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=plain).encode()


def encode_call(
    target: str,
    kwargs: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    through: Mapping[str, str],
) -> bytes:
    """Return the message of a call.

    Raises: DataError for an argument that JSON cannot hold.
    """
    message: dict[str, Any] = {"op": "call", "target": target, "kwargs": dict(kwargs)}
    if through:
        message["through"] = dict(through)
    if state is not None:
        message["state"] = dict(state)
    try:
        return _encode(message)
    except (TypeError, ValueError, RecursionError) as error:
        culprit = next((name for name in kwargs if not _can_encode(kwargs[name])), "?")
        raise DataError(
            f"the argument {culprit!r} of {target} cannot be sent to its process: {error}. "
            "Use text, numbers, lists and dictionaries with text keys."
        ) from None


def _can_encode(value: Any) -> bool:
    try:
        json.dumps(value, default=plain)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _decode(data: bytes) -> Reply:
    try:
        return Reply(**json.loads(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise _Failed("bad reply", f"its answer could not be read: {error}") from None
