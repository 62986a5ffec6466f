"""Programs that start as many processes as they can, within bounds that cannot harm a machine.

None of them makes more than 200 processes, whatever happens; each of these ends after 3 s by
itself; and where cgroups can be made they run in one of their own. It imports no test library: the
system's Python runs it as other users, see `test_process_limit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from localrl.processes import worker as module
from localrl.rewards.sandbox import Sandbox, candidates
from localrl.rewards.sandbox_process import SandboxLimits
from localrl.rewards.sandbox_proof import prove

OUTER_LIMIT = 300
GROUPS = Path("/sys/fs/cgroup/pids")
MB = 1 << 20

BEGIN = """
import os, subprocess, sys, threading, time
fd, count = {fd}, {count}
assert count <= 200

def live():
    time.sleep(3)
    os._exit(0)

def fork():
    try: pid = os.fork()
    except OSError: return None
    if pid: os.write(fd, b".")
    return pid

"""
"""For each process that comes to life, and lives for 3 s, one byte is written."""

SETSID = """
for _ in range(count):
    if fork() == 0:
        os.setsid()
        live()
"""

PROGRAMS = {
    "children in sessions of their own": SETSID,
    "orphans": """
for _ in range(count // 2):
    try: pid = os.fork()
    except OSError: continue
    if pid:
        os.waitpid(pid, 0)
        continue
    os.setsid()
    if fork() == 0: live()
    os._exit(0)
""",
    "everyone forks": """
depth = count.bit_length() - 1
if fork() == 0:
    for _ in range(depth): fork()  # 2 ** depth processes at most
    live()
time.sleep(0.2)
""",
    "threads": """
for _ in range(count):
    try: threading.Thread(target=live, daemon=True).start()
    except RuntimeError: continue
    os.write(fd, b".")
os._exit(0)
""",
    "programs": """
for _ in range(count):
    try: subprocess.Popen(["sleep", "3"])
    except OSError: continue
    os.write(fd, b".")
""",
    "a user namespace of their own": (
        f"code = {BEGIN + SETSID!r}.replace('{{fd}}', str(fd)).replace('{{count}}', str(count))\n"
        "os.execvp('unshare', ['unshare', '--user', sys.executable, '-Ic', code])"
    ),
}


@contextlib.contextmanager
def outer_limit(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox within a cgroup for its processes, where this user may make one."""
    group = GROUPS / f"localrl-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text(f"{OUTER_LIMIT}\n")
    except OSError:
        yield sandbox
        return
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    try:
        yield dataclasses.replace(sandbox, wrap=lambda *args: [*enter, *sandbox.wrap(*args)])
    finally:
        until = time.monotonic() + 4.0  # a wall that failed leaves processes for 3 s
        while (group / "cgroup.procs").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        group.rmdir()


def attempt(sandbox: Sandbox, name: str, *, count: int, limit: int) -> tuple[int, float]:
    """Run a program. Returns how many processes came to life, and its seconds until all were gone.

    All of them sleep until the program has ended, so that they and the program were alive together.
    """
    reading, writing = os.pipe()
    program = BEGIN.format(fd=writing, count=count) + PROGRAMS[name]
    limits = SandboxLimits(2.0, 1024 * MB, MB, processes=limit)
    with open(reading, "rb") as alive, outer_limit(sandbox) as walled:
        with walled.start(program, limits, pass_fds=[writing]) as process:
            os.close(writing)
            seconds = process.wait().seconds
        return len(alive.read()) + 1, seconds


def attempt_in_a_worker() -> list[object]:
    """Return how a function ended that starts too many processes, and the answer of a pool."""
    functions = Path(__file__).with_name("worker_functions.py")
    module.worker_room = lambda: 40
    with module.Worker(time_limit_s=60.0, memory_limit_bytes=None) as worker:
        answer = worker.call(f"{functions}:pool", {"processes": 3}).value
        many = {"count": 80, "path": os.devnull}
        return [worker.call(f"{functions}:start_processes", many).failure, answer]


def main() -> None:
    """Print what each sandbox proves here, and the outcome of one attempt in it and in a worker."""
    found: dict[str, object] = {"worker": attempt_in_a_worker()}
    for sandbox in candidates():
        if isinstance(sandbox, Sandbox):
            with outer_limit(sandbox) as walled:
                problem = prove(walled)
            found[sandbox.name] = problem or attempt(
                sandbox, next(iter(PROGRAMS)), count=200, limit=64
            )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
