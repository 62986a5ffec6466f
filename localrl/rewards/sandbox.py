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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from localrl.errors import ConfigError
from localrl.rewards.sandbox_linux import (
    SYSTEM,
    UNSHARE_TOOLS,
    Wrap,
    bubblewrap,
    readable_folders,
    spare_ids,
    under_another_id,
    unshare,
)
from localrl.rewards.sandbox_process import (
    PYTHON,
    UNLIMITED,
    Outcome,
    Process,
    SandboxLimits,
)

__all__ = ["Outcome", "Sandbox", "candidates", "find_sandbox", "unsafe_sandbox"]

SANDBOX_EXEC = "/usr/bin/sandbox-exec"
UNDER_ANOTHER_ID = "started under another user id"

Which = Callable[[str], str | None]


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
    platform: str = sys.platform,
    which: Which = shutil.which,
    find_ids: Callable[[], range | None] = spare_ids,
) -> list[Sandbox | str]:
    """The sandboxes to try, best first; a text for each whose program is missing.

    find_ids: tells which user ids root may give to programs.
    """
    if platform == "darwin":
        if which(SANDBOX_EXEC) is None:
            return [f"sandbox-exec: there is no {SANDBOX_EXEC}"]
        return [Sandbox("sandbox-exec", _sandbox_exec, own_processes=False)]
    if platform != "linux":
        return []
    ids = find_ids()
    return [*_bubblewraps(which, ids), *_unshares(which, ids)]


def _bubblewraps(which: Which, ids: range | None) -> Iterator[Sandbox | str]:
    bwrap = which("bwrap")
    if bwrap is None:
        yield "bubblewrap: there is no bwrap"
    elif ids is None:
        yield Sandbox("bubblewrap", bubblewrap(bwrap))
    elif which("setpriv") is None:
        yield "bubblewrap, as root: there is no setpriv"
    else:
        yield Sandbox("bubblewrap", bubblewrap(bwrap, ids))
        yield Sandbox(f"bubblewrap {UNDER_ANOTHER_ID}", under_another_id(bubblewrap(bwrap), ids))


def _unshares(which: Which, ids: range | None) -> Iterator[Sandbox | str]:
    missing = [tool for tool in UNSHARE_TOOLS if which(tool) is None]
    if missing:
        yield f"unshare: there is no {', '.join(missing)}"
        return
    yield Sandbox("unshare", unshare(ids))
    if ids is not None:
        yield Sandbox(f"unshare {UNDER_ANOTHER_ID}", under_another_id(unshare(), ids))


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
    if any(UNLIMITED in line for line in tried):
        steps.append(
            "start localrl as a user other than root: the kernel limits the processes of every "
            "other user, and here root may not give programs a user id of their own"
        )
    python = [folder for folder in readable_folders() if folder not in SYSTEM]
    unreadable = [line for line in tried if any(folder in line for folder in python)]
    if unreadable:
        steps.append(f"let every user read {python[0]} and pass through the folders above it")
    refused = [line for line in tried if "denied" in line or "not permitted" in line]
    if any(line not in unreadable for line in refused):
        steps.append(
            "allow user namespaces: on Ubuntu 23.10 and later an AppArmor profile for bwrap "
            "(apt install apparmor-profiles, then link bwrap-userns-restrict from "
            "/usr/share/apparmor/extra-profiles into /etc/apparmor.d and reload it) or, for "
            "everything, sysctl kernel.apparmor_restrict_unprivileged_userns=0; in a container, "
            "allow it to create user namespaces"
        )
    return f"To fix this, {'; and '.join(steps) or 'make one of them work'}; then start again."


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
