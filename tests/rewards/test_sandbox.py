"""Programs that want out, in each sandbox that this machine has."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waiting import DEADLINE_S, FOREVER_S

import localrl
from localrl.errors import ConfigError
from localrl.rewards.sandbox import (
    Sandbox,
    advice,
    candidates,
    find_sandbox,
    first_proven,
    profile,
    unsafe_sandbox,
)
from localrl.rewards.sandbox_process import PYTHON, Outcome, SandboxError, SandboxLimits
from localrl.rewards.sandbox_proof import prove

MB = 1 << 20


@functools.cache
def proven(name: str) -> Sandbox | str:
    """The sandbox of that name, or why there is none here."""
    for sandbox in candidates():
        if isinstance(sandbox, str) and sandbox.startswith(name):
            return sandbox
        if isinstance(sandbox, Sandbox) and sandbox.name == name:
            problem = prove(sandbox)
            return sandbox if problem is None else f"{name}: {problem}"
    return f"{name} is not for {sys.platform}"


@pytest.fixture(params=["sandbox-exec", "bubblewrap", "unshare"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    found = proven(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def run(
    sandbox: Sandbox,
    program: str,
    *,
    time_s: float = DEADLINE_S,
    memory: int = 256 * MB,
    stdin: str = "",
) -> Outcome:
    return sandbox.run(
        program,
        time_limit_s=time_s,
        memory_limit_bytes=memory,
        output_limit_bytes=MB,
        stdin=stdin,
    )


def test_an_honest_program(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "import sys\nprint(sys.stdin.read() + 'é')", stdin="né")
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", "néé\n", "")


def test_a_failing_program_tells_why(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "1 / 0")
    assert outcome.status == "failed"
    assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_it_starts_fresh_in_an_empty_folder(sandbox: Sandbox) -> None:
    program = "import os, sys\nprint(sorted(os.environ), os.listdir(), sorted(sys.argv))"
    os.environ["LOCALRL_TEST_SECRET"] = "secret"
    try:
        outcome = run(sandbox, program)
    finally:
        del os.environ["LOCALRL_TEST_SECRET"]
    assert "SECRET" not in outcome.stdout
    assert outcome.stdout.endswith("['program.py'] ['program.py']\n")


STOPPED = {
    "endless loop": ("while True: pass", "timeout"),
    "sleep": ("import time\ntime.sleep(99)", "timeout"),
    "ignored signals": (
        "import signal\n"
        "for number in range(1, 65):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        "timeout",
    ),
    "memory": ("blocks = []\nwhile True: blocks.append(bytearray(1 << 24))", "memory"),
    "output flood": ("while True: print('x' * 1000)", "output"),
    "output flood on stderr": ("import os\nwhile True: os.write(2, b'x' * 1000)", "output"),
    "many files": (
        "n = 0\nwhile True:\n    open(f'{n}', 'w').write('x' * 500_000)\n    n += 1",
        "output",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()]\nf()",
        None,
    ),
    "exit tricks": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(3)", "ok"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_limits(sandbox: Sandbox, name: str) -> None:
    program, expected = STOPPED[name]
    outcome = run(sandbox, program, time_s=2.0 if expected == "timeout" else DEADLINE_S)
    assert outcome.status == expected or (expected is None and outcome.status != "ok")
    assert len(outcome.stdout) + len(outcome.stderr) < 2 * MB


def test_a_huge_file_is_refused(sandbox: Sandbox) -> None:
    program = "with open('big', 'wb') as file:\n    for _ in range(300): file.write(bytes(1 << 20))"
    outcome = run(sandbox, program)
    assert outcome.status in ("failed", "output")


def test_memory_of_children_counts(sandbox: Sandbox) -> None:
    if sandbox.name == "sandbox-exec":
        pytest.skip("programs cannot have children there")
    program = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        block = bytearray(os.urandom(1 << 20) * 60)\n"
        f"        time.sleep({FOREVER_S})\n"
        f"time.sleep({FOREVER_S})"
    )
    assert run(sandbox, program).status == "memory"


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are of Linux")
@pytest.mark.parametrize(
    "file",
    ["fd = os.memfd_create(str(n))", "fd = os.open('f', os.O_RDWR | os.O_CREAT); os.unlink('f')"],
)
def test_files_without_a_name_count_as_memory(sandbox: Sandbox, file: str) -> None:
    program = (
        "import os, time\n"
        "block = bytes(1 << 20)\n"
        "for n in range(3):\n"
        f"    {file}\n"
        "    for _ in range(40): os.write(fd, block)\n"
        f"time.sleep({FOREVER_S})"
    )
    assert run(sandbox, program, memory=100 * MB).status == "memory"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing can be told of this")
def test_programs_are_the_first_to_end_when_memory_is_exhausted(sandbox: Sandbox) -> None:
    assert run(sandbox, "print(open('/proc/self/oom_score_adj').read())").stdout == "1000\n\n"


def test_home_canary_stays_unread(sandbox: Sandbox) -> None:
    with tempfile.NamedTemporaryFile("w", dir=Path.home(), prefix=".localrl-test-") as canary:
        canary.write("canary")
        canary.flush()
        program = (
            "import os, sys\n"
            "for path in sys.stdin.read().split('\\n'):\n"
            "    try: print(os.listdir(path) if os.path.isdir(path) else open(path).read())\n"
            "    except OSError as error: print('refused')"
        )
        paths = [canary.name, str(Path(__file__).parent), "/etc/passwd", "/root", "/home"]
        outcome = run(sandbox, program, stdin="\n".join(paths))
    assert outcome.status == "ok"
    assert "canary" not in outcome.stdout
    assert "test_sandbox" not in outcome.stdout
    assert "root:" not in outcome.stdout


def test_network_is_refused(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            "import socket\n"
            f"for address in (('127.0.0.1', {server.getsockname()[1]}), ('1.1.1.1', 443)):\n"
            "    try: socket.create_connection(address, timeout=2)\n"
            "    except OSError: print('refused')"
        )
        assert run(sandbox, program).stdout == "refused\nrefused\n"
        assert not select.select([server], [], [], 0)[0]


def test_it_writes_to_its_folder_alone(sandbox: Sandbox) -> None:
    program = (
        "import os, sys, json\n"
        "written = []\n"
        "for folder in json.load(sys.stdin):\n"
        "    try: open(os.path.join(folder, 'localrl-escape'), 'w').close()\n"
        "    except OSError: continue\n"
        "    written.append(folder)\n"
        "print(written)"
    )
    folders = ["/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/usr", "/etc", "/proc", "..", "."]
    folders += [str(Path.home()), sys.base_prefix, tempfile.gettempdir(), str(Path(PYTHON).parent)]
    outcome = run(sandbox, program, stdin=json.dumps(folders))
    assert outcome.stdout == "['.']\n"


def test_its_view_cannot_be_changed_from_within(sandbox: Sandbox) -> None:
    if sys.platform != "linux":
        pytest.skip("mounts are of Linux")
    program = (
        "import os, subprocess\n"
        "for command in ('mount -o remount,bind,rw /usr', 'umount -l /proc',\n"
        "    'unshare -rm mount -o remount,bind,rw /usr', 'unshare -rm umount -l /usr',\n"
        "    'unshare -rm mount -o remount,rw /proc', 'chroot /work /program.py',\n"
        "    'sh -c \"echo x > /proc/sys/kernel/hostname\"', 'kill -9 1'):\n"
        "    print(subprocess.run(command, shell=True, capture_output=True).returncode != 0)\n"
        "try: print(len(open('/usr/localrl-escape', 'w').name))\n"
        "except OSError: print('read-only')\n"
        "try: os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)\n"
        "except OSError: print('read-only')"
    )
    outcome = run(sandbox, program)
    assert outcome.stdout.startswith("True\n" * 7)  # `kill` of the first process just does nothing
    assert outcome.stdout.endswith("read-only\nread-only\n")


def test_other_processes_are_out_of_sight(sandbox: Sandbox) -> None:
    program = f"import os\ntry: os.kill({os.getpid()}, 0)\nexcept OSError: print('refused')"
    assert run(sandbox, program).stdout == "refused\n"


LEAVERS = {
    "setsid": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: hold()\n    os._exit(0)",
    "setsid, then an endless loop": (
        "if os.fork() == 0:\n    os.setsid()\n    hold()\nwhile True: pass"
    ),
    "fork bomb": (
        "if True:\n  for _ in range(9):\n    try: os.fork()\n    except OSError: pass\n  hold()"
    ),
}


@pytest.mark.parametrize("name", LEAVERS)
def test_nothing_is_left(sandbox: Sandbox, name: str) -> None:
    reading, writing = os.pipe()
    program = (
        "import os, time\n"
        "def hold():\n"
        "    while True: time.sleep(0.1)\n"
        "try:\n" + "".join(f"    {line}\n" for line in LEAVERS[name].splitlines()) + ""
        "except PermissionError: pass"
    )
    try:
        with sandbox.start(
            program, SandboxLimits(2.0, 256 * MB, MB), pass_fds=[writing]
        ) as process:
            os.close(writing)
            process.wait()
            assert select.select([reading], [], [], DEADLINE_S)[0]
            assert os.read(reading, 1) == b""  # whoever could write is gone
    finally:
        os.close(reading)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_it_ends_with_a_parent_that_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    script = (
        "from localrl.rewards.sandbox import *\n"
        "from localrl.rewards.sandbox_process import SandboxLimits\n"
        f"s = next(s for s in candidates() if getattr(s, 'name', '') == {sandbox.name!r})\n"
        f"program = 'import os, time; os.write({writing}, bytes(1)); time.sleep({FOREVER_S})'\n"
        f"limits = SandboxLimits({FOREVER_S}, 1 << 28, 100)\n"
        f"with s.start(program, limits, pass_fds=[{writing}]) as p: p.wait()\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(localrl.__path__[0]).parent),
        "TMPDIR": str(tmp_path),
    }
    parent = subprocess.Popen([sys.executable, "-c", script], pass_fds=[writing], env=environment)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"\0"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert select.select([reading], [], [], DEADLINE_S)[0]
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)


def test_folders_are_deleted_whatever_they_hold(sandbox: Sandbox, tmp_path: Path) -> None:
    program = (
        "import os\n"
        "os.mkdir('locked'); open('locked/file', 'w').close(); os.chmod('locked', 0)\n"
        "for _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\n"
        "print('done')"
    )
    old = tempfile.tempdir
    tempfile.tempdir = str(tmp_path)
    try:
        assert run(sandbox, program).stdout == "done\n"
    finally:
        tempfile.tempdir = old
    assert list(tmp_path.iterdir()) == []


def test_the_proof_leaves_no_canary(sandbox: Sandbox) -> None:
    assert prove(sandbox) is None
    assert not list(Path.home().glob(".localrl-canary-*"))


def test_without_a_sandbox_everything_is_refused() -> None:
    """Passes everywhere: a plain process is found out, and nothing is left to fall back on."""
    with pytest.raises(ConfigError, match="No working sandbox was found") as refused:
        first_proven(["bubblewrap: there is no bwrap", unsafe_sandbox()], "linux")
    message = str(refused.value)
    assert "it read" in message
    assert "it connected to 127.0.0.1" in message
    assert "apt install bubblewrap" in message


def test_nothing_found_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Tried: nothing\. Code rewards need macOS or Linux"):
        first_proven(candidates("win32"), "win32")


def test_a_sandbox_that_cannot_start_says_why() -> None:
    broken = Sandbox("broken", lambda folder, command: ["sh", "-c", "echo no: denied >&2; exit 1"])
    with pytest.raises(SandboxError, match="the sandbox did not start: no: denied"):
        run(broken, "print(1)")
    missing = Sandbox("missing", lambda folder, command: ["/no/such/program"])
    with pytest.raises(SandboxError, match=r"the sandbox did not start: .*no.such.program"):
        run(missing, "print(1)")
    with pytest.raises(ConfigError, match=r"no: denied.*apparmor"):
        first_proven([broken], "linux")


def test_what_is_missing_is_named() -> None:
    assert candidates("linux", lambda name: None) == [
        "bubblewrap: there is no bwrap",
        "unshare: there is no unshare, setpriv, mount, umount, pivot_root",
    ]
    assert candidates("darwin", lambda name: None) == [
        "sandbox-exec: there is no /usr/bin/sandbox-exec"
    ]
    assert "nothing to install" in advice("darwin", [])
    denied = advice("linux", ["bubblewrap: no new namespace: Permission denied"])
    assert "user namespaces" in denied
    assert "let every user read" not in denied
    python = os.path.realpath(sys.base_prefix)
    if not python.startswith(("/usr", "/nix")):
        unreadable = advice("linux", [f"bubblewrap: Can't find source path {python}: denied"])
        assert f"let every user read {python}" in unreadable
        assert "user namespaces" not in unreadable


def test_profile_of_macos_denies_by_default() -> None:
    (sandbox,) = candidates("darwin", lambda name: name)
    assert isinstance(sandbox, Sandbox)
    command = sandbox.wrap(Path('/private/var/a "b\\c'), ["python", "x"])
    assert command[:2] == ["/usr/bin/sandbox-exec", "-p"]
    assert command[3:] == ["python", "x"]
    rules = profile(Path('/private/var/a "b\\c/work')).splitlines()
    assert command[2].splitlines() == rules
    assert rules[:2] == ["(version 1)", "(deny default)"]
    assert rules[-2:] == ["(deny process-fork)", "(deny network*)"]
    assert '(allow file-read* file-write* (subpath "/private/var/a \\"b\\\\c/work"))' in rules
    assert sum("file-write" in rule for rule in rules) == 1
    assert not any(f'"{Path.home()}"' in rule for rule in rules)


def test_the_answer_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from localrl.rewards import sandbox as module

    calls: list[int] = []
    plain = unsafe_sandbox()
    monkeypatch.setattr(module, "first_proven", lambda found: calls.append(1) or plain)
    module._find.cache_clear()
    try:
        assert find_sandbox() is find_sandbox() is plain
    finally:
        module._find.cache_clear()
    assert calls == [1]
