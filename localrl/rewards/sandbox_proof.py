"""The test that a sandbox must pass before it runs programs written by the model."""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from localrl.rewards.sandbox import Sandbox
from localrl.rewards.sandbox_process import UNLIMITED, Outcome, SandboxError, SandboxLimits

OUTSIDE = ("1.1.1.1", 443)
LIMITS = SandboxLimits(time_s=20.0, memory_bytes=512 << 20, output_bytes=1 << 16, processes=16)
FORKS = 2 * LIMITS.processes
ESCAPED_CHILD_S = 8.0
GONE_WITHIN_S = 2.0

PROGRAM = """
import json, os, signal, socket, sys, time
asked = json.load(sys.stdin)
escapes = []

def attempt(name, act):
    try:
        act()
    except TimeoutError:
        escapes.append(name + " (not refused at once)")
    except OSError:
        return
    else:
        escapes.append(name)

def write(path):
    with open(path, "a") as file:
        file.write("x")

def connect(address):
    socket.create_connection(tuple(address), timeout=1.0).close()

for path in asked["canaries"]:
    attempt("it read " + path, lambda: open(path).read())
    attempt("it wrote to " + path, lambda: write(path))
for address in asked["addresses"]:
    attempt("it connected to %s:%s" % tuple(address), lambda: connect(address))

def crowd():
    started = []
    try:
        for _ in range(asked["forks"]):
            pid = os.fork()
            if pid == 0:
                time.sleep(3.0)
                os._exit(0)
            started.append(pid)
    except OSError:
        return
    finally:
        for pid in started:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    escapes.append(asked["unlimited"])

def leave_a_child():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            end = time.monotonic() + asked["child_s"]
            while time.monotonic() < end:
                os.write(asked["fd"], b".")
                time.sleep(0.05)
        os._exit(0)

crowd()
try:
    leave_a_child()
except OSError:
    child = "refused"
else:
    child = "started"
    time.sleep(0.2)
print(json.dumps({"escapes": escapes, "child": child}))
"""


def prove(sandbox: Sandbox) -> str | None:
    """Test the sandbox. Returns None if it is secure, else what is wrong with it.

    A program in it must fail to read and to write a canary file in the home folder and one in the
    temporary folder, to connect to a socket of ours and to an outside address, and to start twice
    as many processes as it may have; and a child with its own session must be gone when the program
    has ended.
    """
    with ExitStack() as stack:
        try:
            canaries = [stack.enter_context(_canary(folder)) for folder in _canary_folders()]
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        except OSError as error:
            return f"it cannot be tested: {error}"
        addresses = [listener.getsockname(), OUTSIDE]
        try:
            return _attack(sandbox, [str(path) for path in canaries], addresses)
        except SandboxError as error:
            return str(error)


def _attack(sandbox: Sandbox, canaries: list[str], addresses: list[tuple[str, int]]) -> str | None:
    reading, writing = os.pipe()
    try:
        asked = {
            "canaries": canaries,
            "addresses": addresses,
            "fd": writing,
            "child_s": ESCAPED_CHILD_S,
            "forks": FORKS,
            "unlimited": UNLIMITED,
        }
        process = sandbox.start(PROGRAM, LIMITS, stdin=json.dumps(asked), pass_fds=[writing])
        os.close(writing)
        writing = -1
        with process:
            outcome = process.wait()
            return _judge(outcome, *_until_closed(reading))
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def _judge(outcome: Outcome, heard: bool, closed: bool) -> str | None:
    if outcome.status != "ok":
        lines = outcome.stderr.strip().splitlines() or ["nothing on stderr"]
        return f"a program in it ended with status {outcome.status!r}: {lines[-1]}"
    try:
        told = json.loads(outcome.stdout)
        escapes, child = told["escapes"], told["child"]
    except (ValueError, TypeError, KeyError):
        return "the output of a program in it could not be read"
    if escapes:
        return f"a program escaped: {', '.join(escapes)}"
    if child == "started" and not heard:
        return "the child that was meant to outlive its program never wrote anything"
    return None if closed else "a child outlived its program"


def _until_closed(fd: int) -> tuple[bool, bool]:
    """Returns (True if anything was written, True if all writers closed within the limit)."""
    heard = False
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            if not os.read(fd, 1 << 16):
                return heard, True
            heard = True
    return heard, False


def _canary_folders() -> set[Path]:
    return {Path.home(), Path(tempfile.gettempdir())}


@contextmanager
def _canary(folder: Path) -> Iterator[Path]:
    """A private file with random content, deleted afterwards."""
    handle, name = tempfile.mkstemp(prefix=".localrl-canary-", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        yield Path(name)
    finally:
        os.unlink(name)
