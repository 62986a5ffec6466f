"""The sandbox's limit on processes, tried by programs of at most 200, see `forking`."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import forking
import pytest
from waiting import DEADLINE_S

import localrl
from localrl.errors import ConfigError
from localrl.processes.process_limit import (
    _tasks_by_ps,
    counted_per_namespace,
    tasks_of_user,
)
from localrl.rewards.sandbox import Sandbox, candidates, first_proven
from localrl.rewards.sandbox_linux import spare_ids, unshare
from localrl.rewards.sandbox_process import SandboxLimits
from localrl.rewards.sandbox_proof import prove

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="programs cannot fork elsewhere")
ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"
PACKAGE_PARENT = Path(localrl.__path__[0]).parent
ALL_IDS = "0 0 4294967295"


@functools.cache
def proven(name: str) -> Sandbox | str:
    for sandbox in candidates():
        if isinstance(sandbox, Sandbox) and sandbox.name == name:
            return prove(sandbox) or sandbox
    return f"there is no {name}"


@pytest.fixture(params=["bubblewrap", "unshare"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    found = proven(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@ONLY_LINUX
@pytest.mark.parametrize("name", forking.PROGRAMS)
def test_at_most_64_processes_live_at_any_moment(sandbox: Sandbox, name: str) -> None:
    alive, seconds = forking.attempt(sandbox, name, count=200, limit=64)
    assert alive <= 64
    assert seconds < 3.0
    subprocess.run(["true"], check=True, timeout=DEADLINE_S)  # others still start processes


@ONLY_LINUX
@pytest.mark.parametrize("name", forking.PROGRAMS)
def test_the_kernel_alone_holds_the_limit(sandbox: Sandbox, name: str) -> None:
    """So few that no look from outside ends the program."""
    alive, _ = forking.attempt(sandbox, name, count=50, limit=20)
    assert 5 <= alive <= 20


@ONLY_LINUX
def test_a_program_may_have_some(sandbox: Sandbox) -> None:
    program = (
        "import os, threading\n"
        "for _ in range(20):\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "pids = [os.fork() or os._exit(0) for _ in range(30)]\n"
        "for pid in pids: os.waitpid(pid, 0)\n"
        "os._exit(0)"
    )
    with sandbox.start(program, SandboxLimits(DEADLINE_S, 512 << 20, 1 << 20)) as process:
        outcome = process.wait()
    assert (outcome.status, outcome.stderr) == ("ok", "")


@ONLY_LINUX
@ONLY_ROOT
@pytest.mark.parametrize("user", [0, NOBODY])
def test_it_holds_for_root_and_for_others(user: int) -> None:
    """Every sandbox that proves itself for a user, with a Python that every user can read."""
    me = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
    command = [*me, SYSTEM_PYTHON, "-B", str(Path(forking.__file__))]
    plain = Sandbox("none", lambda folder, command: [*command])
    with tempfile.TemporaryDirectory() as home, forking.outer_limit(plain) as outer:
        os.chown(home, user, user)
        environment = os.environ | {"HOME": home, "PYTHONPATH": str(PACKAGE_PARENT)}
        done = subprocess.run(
            outer.wrap(Path(home), command), env=environment, capture_output=True, check=False
        )
    if done.returncode != 0 and re.search(rb"not found|No module|denied", done.stderr):
        pytest.skip(f"{SYSTEM_PYTHON} cannot be used here: {done.stderr.decode()[-200:]}")
    found = json.loads(done.stdout)
    ended, pool = found.pop("worker")
    assert ended in ("raised", "processes")
    assert pool == [3, 2, 1]
    tried = [outcome for outcome in found.values() if isinstance(outcome, list)]
    if not tried:
        pytest.skip(f"no sandbox holds here: {found}")
    assert all(2 <= alive <= 64 and seconds < 3.0 for alive, seconds in tried)


@ONLY_LINUX
@ONLY_ROOT
def test_a_sandbox_that_does_not_limit_roots_processes_is_refused() -> None:
    if isinstance(found := proven("unshare"), str):
        pytest.skip(found)
    limitless = Sandbox("unshare", unshare())
    with forking.outer_limit(limitless) as walled, pytest.raises(ConfigError) as refused:
        first_proven(["bubblewrap: there is no bwrap", walled])
    assert "the number of processes is not limited" in str(refused.value)
    assert "install bubblewrap" in str(refused.value)
    assert "as a user other than root" in str(refused.value)


def test_root_gives_programs_ids_that_nobody_has() -> None:
    assert spare_ids([ALL_IDS, ALL_IDS]) == range(0x7000_0000, 0x7010_0000)
    container = "0 0 65536"
    rootless = "0 1000 1\n1 100000 65536"
    for ids in ([container, container], [ALL_IDS, container], [rootless, rootless]):
        assert spare_ids(ids) == range(60_578, 61_184)
    assert spare_ids(["0 1000 1", "0 1000 1"]) is None  # `unshare --map-root-user`
    if os.geteuid() != 0:
        assert spare_ids() is None


def test_root_has_more_ways_than_others() -> None:
    def names(ids: range | None, *without: str) -> list[str]:
        found = candidates("linux", lambda name: None if name in without else name, lambda: ids)
        return [sandbox if isinstance(sandbox, str) else sandbox.name for sandbox in found]

    assert names(None) == ["bubblewrap", "unshare"]
    assert names(range(7, 9)) == [
        "bubblewrap",
        "bubblewrap started under another user id",
        "unshare",
        "unshare started under another user id",
    ]
    assert names(range(7, 9), "setpriv", "unshare") == [
        "bubblewrap, as root: there is no setpriv",
        "unshare: there is no unshare, setpriv",
    ]
    assert names(None, "setpriv") == ["bubblewrap", "unshare: there is no setpriv"]


def test_the_limit_is_relative_where_the_user_is_shared() -> None:
    """On macOS, and with the kernels that count a user's processes wherever they run."""
    assert counted_per_namespace("5.14.0-427.el9.x86_64")
    assert counted_per_namespace("6.1.0-18-amd64")
    assert not counted_per_namespace("5.10.0-21-amd64")
    assert not counted_per_namespace("4.18.0-553.el8_10.x86_64")
    limits = SandboxLimits(1.0, 1 << 20, 1 << 20)
    assert "NPROC=364" in limits.words(300)
    assert "NPROC=64" in limits.words(0)
    assert not any(word.startswith("NPROC") for word in limits.words(None))


def test_processes_and_threads_are_counted() -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(20)]
    before = tasks_of_user()
    for thread in threads:
        thread.start()
    after, processes = tasks_of_user(), _tasks_by_ps(os.geteuid())
    stop.set()
    assert before is not None
    assert after is not None
    assert processes is not None
    assert processes >= 2
    if sys.platform == "linux":
        assert after >= 21
