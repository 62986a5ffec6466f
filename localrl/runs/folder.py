"""The run folder: locks it for one writer, and keeps its marker, configuration, plan and logs.

    run.json        marker and versions       metrics.jsonl    one object per step
    config.toml     the resolved settings     rollouts.jsonl   one object per group
    plan.json       the memory plan           events.jsonl     everything else that happened

No function here deletes anything of a run.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Self, TextIO

from localrl.errors import ConfigError
from localrl.records import MemoryPlan
from localrl.runs.logs import GroupRecord, JsonLines, rollout_line, to_json, write_atomic

FORMAT = 1
MARKER = "run.json"
LOCK = ".lock"
IGNORED = {LOCK, ".DS_Store"}
STEP_LOGS = ("metrics", "rollouts")
LOGS = (*STEP_LOGS, "events")
THINNED_EVERY = 10


def open_run(
    out: Path,
    *,
    overwrite: bool,
    versions: Mapping[str, str | None] | None = None,
    rollout_log_limit: int | None = None,
) -> RunFolder:
    """Create a run folder, lock it for this process, and mark it as a run of localrl.

    overwrite: rename an existing run to NAME.old-<time> instead of refusing it. versions: package
    versions for run.json; see `package_versions`. rollout_log_limit: bytes of rollouts.jsonl above
    which only some groups are written.

    Raises:
        ConfigError: the folder is not empty, is used by another process, or cannot be written.
    """
    try:
        while (lock := _claim(out, overwrite)) is None:
            pass
        write_atomic(out / MARKER, to_json(_marker(versions or {}), indent=2) + b"\n")
        return RunFolder(out, lock, rollout_log_limit)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"The run folder {out} cannot be created: {reason}. Choose another with --out."
        ) from error


def reopen_run(out: Path, *, rollout_log_limit: int | None = None) -> RunFolder:
    """Lock a run folder that an earlier process made, to continue its run.

    Raises:
        ConfigError: there is no run there, or another process uses it.
    """
    try:
        if not (out / MARKER).is_file():
            raise ConfigError(
                f"There is no run in {out} to resume (no {MARKER}). Name its folder with --out, "
                "or leave out --resume to start a new one."
            )
        lock = _lock(out)
        if lock is None:
            raise ConfigError(f"The run folder {out} was renamed just now. Find its new name.")
        run = RunFolder(out, lock, rollout_log_limit)
        run.mend_events()
        return run
    except OSError as error:
        raise ConfigError(f"The run folder {out} cannot be used: {error.strerror}.") from error


class RunFolder:
    """A locked run folder; use it as a context manager, or close it, to release the lock."""

    def __init__(self, path: Path, lock: TextIO, rollout_log_limit: int | None) -> None:
        self.path = path
        self._lock = lock
        self._limit = rollout_log_limit
        self._logs = {name: JsonLines(path / f"{name}.jsonl") for name in LOGS}
        self._thinning = self._full()  # a resumed run has announced it before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the logs and release the lock."""
        for log in self._logs.values():
            log.close()
        self._lock.close()

    def write_config(self, text: str) -> None:
        """Store the resolved configuration, in TOML."""
        write_atomic(self.path / "config.toml", text.encode())

    def write_plan(self, plan: MemoryPlan) -> None:
        """Store the memory plan."""
        write_atomic(self.path / "plan.json", to_json(asdict(plan), indent=2) + b"\n")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append the metrics of one step."""
        self._logs["metrics"].append(record)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append an event, with the time."""
        self._logs["events"].append({"time": _now(), "kind": kind, **fields})

    def mend_events(self) -> None:
        """Remove a last event left incomplete by a crash."""
        self._logs["events"].mend()

    def rollouts(self, step: int, records: Sequence[GroupRecord]) -> None:
        """Append the groups of one step; above the size limit, one in `THINNED_EVERY` of them.

        The choice depends only on step and index, so that a resumed run writes the same groups.
        """
        for index, record in enumerate(records):
            if self._full():
                self._announce_thinning(step)
                if (step + index) % THINNED_EVERY:
                    continue
            self._logs["rollouts"].append(rollout_line(step, record))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the step logs. A checkpoint stores them, see `cut`."""
        return {name: self._logs[name].size for name in STEP_LOGS}

    def sync(self) -> None:
        """Sync all lines to disk, so that they survive a power cut."""
        for log in self._logs.values():
            log.sync()

    def has_metrics(self, step: int, sizes: Mapping[str, int]) -> bool:
        """Return True if the metrics have all lines that they had after this step, with these
        sizes."""
        return self._logs["metrics"].bytes_of(step) >= sizes["metrics"]

    def cut(self, step: int, sizes: Mapping[str, int]) -> list[str]:
        """Remove the lines of steps that will be repeated, and damaged ones; events stay.

        step, sizes: the last step that stays, and the bytes of the step logs after it. Returns the
        files that have lost lines of the steps up to it.
        """
        lost = []
        for name, size in sizes.items():
            log = self._logs[name]
            # No run reads its rollouts, and there may be gigabytes of them.
            if log.ends_a_line(size) and (name == "rollouts" or log.ends_with(step, size)):
                log.cut(size)
                continue
            log.keep(step)
            if log.size < size:
                lost.append(f"{name}.jsonl")
        self._thinning = self._full()
        return lost

    def _full(self) -> bool:
        return self._limit is not None and self._logs["rollouts"].size >= self._limit

    def _announce_thinning(self, step: int) -> None:
        if not self._thinning:
            self._thinning = True
            self.event("rollouts_thinned", step=step, limit_bytes=self._limit, every=THINNED_EVERY)


def default_run_path(base: Path, stem: str) -> Path:
    """Return the first of base/stem-1, base/stem-2, … that does not exist."""
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"
    return next(path for n in count(1) if not (path := base / f"{name}-{n}").exists())


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return installed versions by name, without importing anything; None if not installed."""
    return {name.replace("-", "_"): _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _marker(versions: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "localrl": _version("localrl"),
        "format": FORMAT,
        "created": _now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _claim(out: Path, overwrite: bool) -> TextIO | None:
    """Lock an empty folder at `out`; None if the folder changed meanwhile: try again."""
    if _is_used(out):
        if not overwrite:
            raise ConfigError(
                f"The run folder {out} exists and is not empty. Choose another with --out, "
                "continue with --resume, or move the old run aside with --overwrite."
            )
        _move_aside(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    if lock is not None and _is_used(out):
        lock.close()
        return None
    return lock


def _is_used(out: Path) -> bool:
    """Return True if the folder contains anything except the remains of a process that was killed
    before its run began. Raises NotADirectoryError for a file."""
    try:
        return not all(_is_left_over(entry) for entry in out.iterdir())
    except FileNotFoundError:
        return False


def _is_left_over(entry: Path) -> bool:
    return entry.name in IGNORED or entry.name.startswith(f".{MARKER}.tmp-")


def _move_aside(out: Path) -> None:
    """Rename a run of localrl that no process uses."""
    # Another process may be about to write its marker: then locking gives a better message.
    if (out / MARKER).is_file() or (out / LOCK).exists():
        lock = _lock(out)
        if lock is None:
            return
        with lock:
            if (out / MARKER).is_file():
                out.rename(_old_name(out))
                return
    raise ConfigError(
        f"The run folder {out} contains no {MARKER}, so it is not a run of localrl and --overwrite "
        "leaves it alone. Choose another with --out."
    )


def _old_name(out: Path) -> Path:
    """Return NAME.old-<time>, with a number appended if two fall into the same second."""
    stamp = f"{out.name}.old-{datetime.now():%Y%m%d-%H%M%S}"
    names = (stamp if n == 1 else f"{stamp}-{n}" for n in count(1))
    return next(path for name in names if not (path := out.with_name(name)).exists())


def _lock(out: Path) -> TextIO | None:
    """Lock a folder and return its lock file; None if the folder was renamed meanwhile.

    The lock belongs to the open file: it ends with its process, however that ends.
    """
    try:
        lock = (out / LOCK).open("a+", encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        with lock:
            holder = lock.read().strip() or "unknown"
        raise ConfigError(
            f"The run folder {out} is used by another process ({holder}). Wait until it ends, "
            "stop it, or choose another folder with --out."
        ) from None
    if not _is_at(lock, out / LOCK):
        lock.close()
        return None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _is_at(file: TextIO, path: Path) -> bool:
    """Return True if the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
