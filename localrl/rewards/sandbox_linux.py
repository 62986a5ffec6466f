"""The sandboxes of Linux, as commands: bubblewrap and `unshare`, for root and for other users.

The kernel limits how many processes a user has, unless it is root. For root a program therefore
runs under a user id of its own, which nobody else on the machine has.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Wrap = Callable[[Path, Sequence[str]], list[str]]

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
LINKER_CACHE = "/etc/ld.so.cache"
UNSHARE_TOOLS = ("unshare", "setpriv", "mount", "umount", "pivot_root")
SPARE_IDS = (range(0x7000_0000, 0x7010_0000), range(60_578, 61_184))
"""User ids that no distribution gives to anyone; the second range is for containers of 65536 ids.
Each program gets another one, so that its processes are counted alone."""
_TURN = itertools.count(secrets.randbelow(1 << 20))


def spare_ids(maps: Sequence[str] | None = None) -> range | None:
    """User and group ids that nobody has, or None if this user may take no other id.

    maps: the texts of `/proc/self/uid_map` and `gid_map`; read from there if None.
    """
    if maps is None:
        if os.geteuid() != 0:
            return None
        maps = [Path(f"/proc/self/{kind}_map").read_text() for kind in ("uid", "gid")]
    return next((ids for ids in SPARE_IDS if all(_holds(text, ids) for text in maps)), None)


def _holds(id_map: str, ids: range) -> bool:
    lines = [[int(word) for word in line.split()] for line in id_map.splitlines()]
    return any(first <= ids[0] and ids[-1] < first + count for first, _, count in lines)


def _next_of(ids: range) -> int:
    return ids[next(_TURN) % len(ids)]


def _hand_over(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)


def _become(user: int) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all"]


def under_another_id(wrap: Wrap, ids: range) -> Wrap:
    """The command under an id of its own from the start, for a root that may not mount."""

    def wrapped(folder: Path, command: Sequence[str]) -> list[str]:
        user, inner = _next_of(ids), wrap(folder, command)
        _hand_over(folder, user)
        return [*_become(user), "--", *inner]

    return wrapped


def readable_folders() -> list[str]:
    """Folders a program may read outside its own: the system's libraries and Python itself."""
    python = {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}
    system = [folder for folder in SYSTEM if os.path.isdir(folder)]
    extra = [folder for folder in python if not folder.startswith(("/usr/", "/nix/store/"))]
    return [*system, *sorted(folder for folder in extra if folder != "/usr")]


def bubblewrap(program: str, ids: range | None = None) -> Wrap:
    """The sandbox of the program `bwrap`; with ids, root's, which mounts and then drops to one."""
    return functools.partial(_bubblewrap, program, ids)


def _bubblewrap(program: str, ids: range | None, folder: Path, command: Sequence[str]) -> list[str]:
    mounts: list[str] = []
    for path in readable_folders():
        link = os.path.islink(path)
        for parent in reversed(Path(path).parents[:-1]):  # bwrap itself may close them to others
            mounts += ["--dir", str(parent)]
        mounts += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    spaces, become = ["--unshare-all", "--cap-drop", "ALL"], []
    if ids is not None:
        user = _next_of(ids)
        _hand_over(folder / "work", user)
        spaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        spaces += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
        spaces += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        become = [*_become(user), "--"]
    return [
        *(program, *spaces, "--die-with-parent", "--new-session"),
        *(*mounts, "--ro-bind-try", LINKER_CACHE, LINKER_CACHE),
        *("--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--bind", str(folder / "work"), "/work", "--chdir", "/work", "--remount-ro", "/"),
        *("--", *become, *command),
    ]


UNSHARE_SCRIPT = """
set -e
root=$1 work=$2 user=$3
shift 3
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
drop="--no-new-privs --inh-caps=-all --bounding-set=-all"
if [ "$user" = self ]; then
  exec setpriv $drop -- sh -c '"$@"; exit $?' sh "$@"
fi
setpriv --reuid="$user" --regid="$user" --clear-groups $drop -- "$@" || exit $?
"""
"""Script that builds a new root, leaves the old one, drops all privileges and runs the command.

For root the script remains as the first process, which the program may neither see into nor signal.
"""


def unshare(ids: range | None = None) -> Wrap:
    """The sandbox of util-linux; with ids, root's, which mounts and then drops to one of them."""
    return functools.partial(_unshare, ids)


def _unshare(ids: range | None, folder: Path, command: Sequence[str]) -> list[str]:
    root, work = folder / "root", folder / "work"
    root.mkdir(exist_ok=True)
    spaces, user = ["--user", "--map-root-user"], "self"
    if ids is not None:
        spaces, user = [], str(_next_of(ids))
        _hand_over(work, int(user))
    return [
        *("setpriv", "--pdeathsig", "KILL", "unshare", *spaces),
        *("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"),
        *("sh", "-c", UNSHARE_SCRIPT, "sh", str(root), str(work), user),
        *(*readable_folders(), "--", *command),
    ]
