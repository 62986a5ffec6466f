"""Runs one program under limits: starts it, monitors it, kills it with everything it started.

The kernel enforces the limits that a process sets on itself and hands on to its children (number of
processes, CPU time, address space, size and number of files); wall time, memory, output and folder
of the whole tree are monitored from here. None of them can a program undo. If memory runs out all
the same, the kernel ends a program before anything else.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from localrl.processes.process_limit import (
    children,
    counted_per_namespace,
    family,
    tasks_of_user,
)
from localrl.processes.worker import MEMORY_POLL_S
from localrl.rewards.sandbox_measures import folder_is_full, memory_bytes

Status = Literal["ok", "failed", "timeout", "memory", "output"]

PROCESS_LIMIT = 64
UNLIMITED = "the number of processes is not limited"
FILE_LIMIT = 64
DISK_LIMIT_BYTES = 64 << 20
STDERR_TAIL = 2000
POLL_S = 0.02
DISK_POLL_S = 0.2
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
BOOTSTRAP = Path(__file__).with_name("sandbox_child.py")
START_LIMIT_S = 30.0
END_LIMIT_S = 30.0
KILL_AGAIN_S = 0.5
PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
FIRST_TO_END = ["sh", "-c", '{ echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; exec "$@"', "sh"]
"""Runs a command as the first that Linux ends when the machine's memory is exhausted."""


class SandboxError(RuntimeError):
    """The sandbox itself did not start, which is not the program's fault."""


@dataclass(frozen=True)
class Outcome:
    """The end status of a program and its output."""

    status: Status
    """"ok" for exit status 0; "output" if it wrote too much, to its outputs or its folder."""
    stdout: str
    stderr: str
    """Last 2000 bytes of stderr."""
    seconds: float
    """Seconds from the start of the program, once the sandbox is up, to its end."""


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of one program."""

    time_s: float
    memory_bytes: int
    output_bytes: int
    processes: int = PROCESS_LIMIT
    """Number of processes and threads alive at any moment."""

    def words(self, others: int | None) -> list[str]:
        """Arguments for `sandbox_child.py`.

        others: number of processes that the kernel counts with the program's; None if unknown, and
            then their number is not limited.
        """
        seconds = math.ceil(self.time_s) + 1
        values = {
            "CPU": seconds,
            "AS": self.memory_bytes,
            "FSIZE": DISK_LIMIT_BYTES,
            "NOFILE": FILE_LIMIT,
            "CORE": 0,
            "ALARM": seconds + 1,
        }
        if others is not None:
            values["NPROC"] = self.processes + others
        return [f"{name}={value}" for name, value in values.items()]


class Process:
    """A program running in a fresh folder. Use it as a context manager: leaving kills it.

    wrap: builds the command that runs a command in the sandbox, given the fresh folder.
    own_processes: True if the sandbox has its own process numbers, so nothing outlives its first
        process.
    pass_fds: descriptors that the program inherits.
    """

    def __init__(
        self,
        wrap: Callable[[Path, Sequence[str]], list[str]],
        program: str,
        limits: SandboxLimits,
        *,
        stdin: str = "",
        own_processes: bool,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._limits = limits
        self._own_processes = own_processes
        self._folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="localrl-code-")))
        self._work = self._folder / "work"
        reading, writing = os.pipe()
        self._started_pipe = os.fdopen(reading, "rb", buffering=0)
        try:
            self._work.mkdir()
            _write(self._work / "program.py", program)
            _write(self._folder / "stdin", stdin)
            command = [PYTHON, "-I", "-S", "-B", "-X", "utf8", "-c", BOOTSTRAP.read_text()]
            command += [*limits.words(_others(own_processes)), f"STARTED={writing}"]
            with (self._folder / "stdin").open("rb") as source:
                self._process = subprocess.Popen(
                    [*FIRST_TO_END, *wrap(self._folder, command)],
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=self._work,
                    env=_environment(self._work, own_processes),
                    pass_fds=[*pass_fds, writing],
                    start_new_session=True,
                )
        except OSError as error:
            self._started_pipe.close()
            remove_folder(self._folder)
            raise SandboxError(f"the sandbox could not be started: {error}") from error
        finally:
            os.close(writing)
        self._started: float | None = None
        self._deadline = time.monotonic() + START_LIMIT_S
        self._output = {"started": bytearray(), "stdout": bytearray(), "stderr": bytearray()}
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._streams = {
            "started": self._started_pipe,
            "stdout": self._process.stdout,
            "stderr": self._process.stderr,
        }
        for name, stream in self._streams.items():
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._selector.close()
        for stream in self._streams.values():
            stream.close()
        remove_folder(self._folder)

    def wait(self) -> Outcome:
        """Wait until the program has ended or was killed for exceeding a limit.

        Raises:
            SandboxError: the program was never started.
        """
        status = self._watch()
        if status is None:
            code = self._process.wait()
            before = -1
            while before < self._written <= self._limits.output_bytes:  # read what is left
                before = self._written
                self._read(0)
            status = self._verdict(code)
        self.kill()
        out, err = (bytes(self._output[name]) for name in ("stdout", "stderr"))
        tail = _text(err[-STDERR_TAIL:])
        if self._started is None:
            raise SandboxError(f"the sandbox did not start: {tail.strip() or status}")
        return Outcome(status, _text(out), tail, time.monotonic() - self._started)

    def kill(self) -> None:
        """Kill the program and everything it started; does nothing if it has ended."""
        deadline = time.monotonic() + END_LIMIT_S
        while self._own_processes and self._process.poll() is None and time.monotonic() < deadline:
            # The kernel ends everything in such a sandbox when its first process ends, and the
            # process that we started returns only then. It may not have got so far as to start it.
            for pid in children(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_AGAIN_S)
        if self._process.poll() is None or not self._own_processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _watch(self) -> Status | None:
        """None if the program ended by itself, else the limit it exceeded."""
        next_memory = next_disk = 0.0
        while self._process.poll() is None:
            now = time.monotonic()
            if now >= self._deadline:
                return "timeout"
            if self._read(min(self._deadline - now, POLL_S)):
                return "output"
            if now >= next_memory:
                next_memory = now + MEMORY_POLL_S
                if self._too_large():
                    return "memory"
            if now >= next_disk:
                next_disk = now + DISK_POLL_S
                if folder_is_full(self._work, DISK_LIMIT_BYTES):
                    return "output"
        return None

    def _read(self, wait_s: float) -> bool:
        """Read what has been written so far; True if it is too much."""
        if not self._selector.get_map():  # all streams are closed: it is about to end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
            return False
        for key, _ in self._selector.select(wait_s):
            stream = key.fileobj
            assert not isinstance(stream, int)
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                self._selector.unregister(stream)
            self._output[key.data] += piece
            if key.data == "started" and piece and self._started is None:
                self._started = time.monotonic()
                self._deadline = self._started + self._limits.time_s
        return self._written > self._limits.output_bytes

    @property
    def _written(self) -> int:
        return sum(map(len, self._output.values()))

    def _too_large(self) -> bool:
        tree = family(self._process.pid, PROCESS_LIMIT)
        return len(tree) >= PROCESS_LIMIT or memory_bytes(tree) > self._limits.memory_bytes

    def _verdict(self, code: int) -> Status:
        if self._written > self._limits.output_bytes:
            return "output"
        last = self._output["stderr"].rstrip().rpartition(b"\n")[2]
        if code != 0 and last.startswith(b"MemoryError"):
            return "memory"
        return "ok" if code == 0 else "failed"


def remove_folder(folder: Path) -> None:
    """Delete a folder, whatever a program has left in it."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # locked folders, or thousands inside one another
        for command in (["chmod", "-R", "u+rwx", "--"], ["rm", "-rf", "--"]):
            subprocess.run([*command, str(folder)], capture_output=True, check=False)


def _others(own_processes: bool) -> int | None:
    """Number of processes that the kernel counts together with those of a program."""
    if own_processes and (os.geteuid() == 0 or counted_per_namespace()):
        return 0  # root gives each program a user id of its own
    return tasks_of_user()


def _environment(work: Path, own_root: bool) -> dict[str, str]:
    # An arena of glibc takes 64 MB of the address space: with one for each, there were six threads.
    place = "/work" if own_root else os.fspath(work)
    return {"PATH": PATH, "TMPDIR": place, "MALLOC_ARENA_MAX": "1"}


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
