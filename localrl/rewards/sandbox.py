"""Runs untrusted programs in a sandbox that has proved itself on this machine.

`find_sandbox` tries what the system offers (`sandbox-exec` on macOS, bubblewrap or `unshare` on
Linux) and takes the first that passes `sandbox_proof.prove`. In each, a program sees Python and
the system's libraries read-only, one fresh folder, no network and no other process.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from localrl.errors import ConfigError
from localrl.rewards.sandbox_process import PYTHON, Outcome, Process, SandboxLimits

__all__ = ["Outcome", "Sandbox", "candidates", "find_sandbox", "unsafe_sandbox"]

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
LINKER_CACHE = "/etc/ld.so.cache"
SANDBOX_EXEC = "/usr/bin/sandbox-exec"
UNSHARE_TOOLS = ("unshare", "setpriv", "mount", "umount", "pivot_root")

Wrap = Callable[[Path, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs.

    wrap: builds the sandboxed command from a folder (programs write only to its `work`) and a
        command.
    own_processes: True if it has its own process numbers, and with them its own file system.
    """

    name: str
    wrap: Wrap
    own_processes: bool = True
    safe: bool = True

    def run(
        self,
        program: str,
        *,
        time_limit_s: float,
        memory_limit_bytes: int,
        output_limit_bytes: int,
        stdin: str = "",
    ) -> Outcome:
        """Run a program until it ends or exceeds a limit.

        By the time this returns, everything it started has ended and its folder is deleted.
        """
        limits = SandboxLimits(time_limit_s, memory_limit_bytes, output_limit_bytes)
        with self.start(program, limits, stdin=stdin) as process:
            return process.wait()

    def start(
        self, program: str, limits: SandboxLimits, *, stdin: str = "", pass_fds: Sequence[int] = ()
    ) -> Process:
        """Start a program; wait for it, or leave its context to kill it."""
        return Process(
            self.wrap,
            program,
            limits,
            stdin=stdin,
            own_processes=self.own_processes,
            pass_fds=pass_fds,
        )


def find_sandbox() -> Sandbox:
    """The first sandbox of this system that proves itself; the result is cached.

    Raises:
        ConfigError: none does; it says what failed in each, and what to install or enable.
    """
    return _find()


@functools.cache
def _find() -> Sandbox:
    return first_proven(candidates())


def first_proven(found: Iterable[Sandbox | str], platform: str = sys.platform) -> Sandbox:
    """The first sandbox that proves itself; a text in `found` says why one is unavailable."""
    from localrl.rewards.sandbox_proof import prove

    tried: list[str] = []
    for sandbox in found:
        if isinstance(sandbox, str):
            tried.append(sandbox)
            continue
        problem = prove(sandbox)
        if problem is None:
            return sandbox
        tried.append(f"{sandbox.name}: {problem}")
    raise ConfigError(
        "No working sandbox was found, so programs written by the model are not run. Tried: "
        f"{'; '.join(tried) or 'nothing'}. {advice(platform, tried)}"
    )


def candidates(
    platform: str = sys.platform, which: Callable[[str], str | None] = shutil.which
) -> list[Sandbox | str]:
    """The sandboxes to try, best first; a text for each whose program is missing."""
    if platform == "darwin":
        if which(SANDBOX_EXEC) is None:
            return [f"sandbox-exec: there is no {SANDBOX_EXEC}"]
        return [Sandbox("sandbox-exec", _sandbox_exec, own_processes=False)]
    if platform != "linux":
        return []
    bwrap = which("bwrap")
    found: list[Sandbox | str] = ["bubblewrap: there is no bwrap"]
    if bwrap is not None:
        found = [Sandbox("bubblewrap", functools.partial(_bubblewrap, bwrap))]
    missing = [tool for tool in UNSHARE_TOOLS if which(tool) is None]
    if missing:
        return [*found, f"unshare: there is no {', '.join(missing)}"]
    return [*found, Sandbox("unshare", _unshare)]


def unsafe_sandbox() -> Sandbox:
    """No sandbox: limits on time, memory and output only. Use only on explicit request."""
    return Sandbox("none", lambda folder, command: [*command], own_processes=False, safe=False)


def advice(platform: str, tried: Sequence[str]) -> str:
    """Advice on what to install or enable."""
    if platform == "darwin":
        return (
            "macOS includes sandbox-exec, so there is nothing to install, but it cannot be nested: "
            "start localrl outside any other sandbox, such as a coding agent's."
        )
    if platform != "linux":
        return f"Code rewards need macOS or Linux; this is {platform}."
    steps = []
    if any("there is no bwrap" in line for line in tried):
        steps.append("install bubblewrap (apt install bubblewrap, dnf install bubblewrap)")
    if any("denied" in line or "not permitted" in line for line in tried):
        steps.append(
            "allow user namespaces: on Ubuntu 23.10 and later an AppArmor profile for bwrap "
            "(apt install apparmor-profiles, then link bwrap-userns-restrict from "
            "/usr/share/apparmor/extra-profiles into /etc/apparmor.d and reload it) or, for "
            "everything, sysctl kernel.apparmor_restrict_unprivileged_userns=0; in a container, "
            "allow it to create user namespaces"
        )
    return f"To fix this, {'; and '.join(steps) or 'make one of them work'}; then start again."


def readable_folders() -> list[str]:
    """Folders a program may read outside its own: the system's libraries and Python itself."""
    python = {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}
    system = [folder for folder in SYSTEM if os.path.isdir(folder)]
    extra = [folder for folder in python if not folder.startswith(("/usr/", "/nix/store/"))]
    return [*system, *sorted(folder for folder in extra if folder != "/usr")]


def _bubblewrap(bwrap: str, folder: Path, command: Sequence[str]) -> list[str]:
    mounts: list[str] = []
    for path in readable_folders():
        link = os.path.islink(path)
        mounts += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    return [
        *(bwrap, *options, *mounts, "--ro-bind-try", LINKER_CACHE, LINKER_CACHE),
        *("--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--bind", str(folder / "work"), "/work", "--chdir", "/work", "--remount-ro", "/"),
        *("--", *command),
    ]


UNSHARE_SCRIPT = """
set -e
root=$1 work=$2
shift 2
mount -t tmpfs -o mode=755,size=8m tmpfs "$root"
cd "$root"
mkdir proc dev etc work
while [ "$1" != -- ]; do
  if [ -L "$1" ]; then
    cp -P "$1" "$root$1"
  else
    mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1" 2>/dev/null ||
      mount -o remount,bind,ro,nosuid,nodev,noatime "$root$1"
  fi
  shift
done
shift
cp /etc/ld.so.cache etc/ 2>/dev/null || true
for name in null zero random urandom; do
  : > dev/$name
  mount --bind /dev/$name dev/$name
done
mount -t proc -o ro,nosuid,nodev,noexec proc proc
mount --bind "$work" work
mount -o remount,bind,ro "$root"
pivot_root . .
umount -l .
cd /work
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all -- sh -c '"$@"; exit $?' sh "$@"
"""
"""Script that builds a new root, leaves the old one, drops all privileges and runs the command."""


def _unshare(folder: Path, command: Sequence[str]) -> list[str]:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    spaces = [
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--net",
        "--ipc",
        "--uts",
        "--fork",
        "--kill-child",
    ]
    return [
        *("setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "--fork", "--kill-child"),
        *("sh", "-c", UNSHARE_SCRIPT, "sh"),
        *(str(root), str(folder / "work"), *readable_folders(), "--", *command),
    ]


def _sandbox_exec(folder: Path, command: Sequence[str]) -> list[str]:
    return [SANDBOX_EXEC, "-p", profile(folder / "work"), *command]


def profile(work: Path) -> str:
    """The rules for `sandbox-exec`; if several match, the last one applies."""
    prefixes = sorted({os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)})
    python = " ".join(f"(subpath {_quoted(path)})" for path in prefixes)
    place = f"(subpath {_quoted(os.path.realpath(work))})"
    brew = '(subpath "/opt/homebrew/opt") (subpath "/opt/homebrew/Cellar")'
    return f"""(version 1)
(deny default)
(import "system.sb")
(allow process-exec* (literal {_quoted(PYTHON)}) {python})
(allow file-read-metadata)
(allow file-read* file-map-executable {python} {brew})
(allow file-read* file-write* {place})
(allow sysctl-read)
(deny process-fork)
(deny network*)
"""


def _quoted(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
