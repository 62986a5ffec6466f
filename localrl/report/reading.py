"""Reads a run folder as plain data, also while the run is active.

Nothing outside the folder is read, no file of it is written, and no missing or incomplete file
stops it: unreadable lines are counted.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from localrl.errors import ConfigError
from localrl.report.growing import GrowingFile, JsonLog, group_of, parsed
from localrl.runs.folder import LOCK, MARKER
from localrl.utils.intervals import wilson

EVALUATION = "evaluation"
"""Kind of the events that hold the answers of an evaluation."""


@dataclass(frozen=True)
class Score:
    """One evaluation on held-out prompts."""

    step: int
    pass_at_1: float | None
    n: int
    mean_reward: float | None
    mean_tokens: float | None
    temperature: float = 1.0
    """Sampling temperature; older runs do not record it and sampled at 1; 0 means greedy."""
    prompts: str = ""
    """Digest of the prompts; empty in older runs."""
    passed: Sequence[bool | None] = ()
    """The verdict on each prompt, in order; empty in older runs."""
    seconds: float | None = None
    """Its duration; None in older runs."""
    loss: float | None = None
    """Mean loss per token of held-out worked examples; None if the run has none."""
    demonstrations: int = 0
    """Number of these."""
    shown: Sequence[Mapping[str, Any]] = ()
    """Some prompts with their completions, the same ones in every evaluation of a run."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of pass@1."""
        if self.pass_at_1 is None or self.n < 1:
            return None
        return wilson(round(self.pass_at_1 * self.n), self.n)


@dataclass(frozen=True)
class Run:
    """The contents of a run folder."""

    path: Path
    marker: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Settings by name, `section.field`; unset ones are missing."""
    plan: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    """Metrics of each step, in order."""
    scores: Sequence[Score]
    events: Sequence[Mapping[str, Any]]
    unread: Mapping[str, int]
    """Number of lines that could not be read, by file; an incomplete last line does not count."""
    holder: str
    """Process and machine that last worked in the folder, as written in its lock."""
    held: bool | None
    """True if that process still does; None if it was on another machine."""
    has_adapter: bool

    @property
    def supervised(self) -> bool:
        """True if completions were given, and not sampled."""
        return "task.demonstrations" in self.settings

    @property
    def planned_steps(self) -> int | None:
        """Number of steps that the settings ask for."""
        steps = self.settings.get("run.steps")
        return steps if isinstance(steps, int) else None

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped`, or `unknown` if only another machine could tell."""
        if self.held:
            return "running"
        if self.has_adapter:
            return "finished"
        return "unknown" if self.held is None else "stopped"

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0


class RunReader:
    """Reads a run folder again and again, each time only what was added to its logs."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError if there is no run in the folder."""
        if not (path / MARKER).is_file():
            raise ConfigError(
                f"There is no run in {path} (no {MARKER}). Name the folder that `localrl train` "
                "wrote, for example runs/steps-1."
            )
        self.path = path
        self._metrics = JsonLog(path / "metrics.jsonl")
        self._events = JsonLog(path / "events.jsonl")

    def read(self) -> Run:
        """Read everything in the folder except its rollouts."""
        path, lines, events = self.path, self._metrics.read(), self._events.read()
        unread = {"metrics.jsonl": self._metrics.unread, "events.jsonl": self._events.unread}
        holder, held = _holder(path / LOCK)
        return Run(
            path=path,
            marker=_object(path / MARKER),
            settings=_settings(path / "config.toml"),
            plan=_object(path / "plan.json"),
            steps=[line for line in lines if _is_step(line)],
            scores=_scores(lines, events),
            events=[event for event in events if event.get("kind") != EVALUATION],
            unread={name: count for name, count in unread.items() if count},
            holder=holder,
            held=held,
            has_adapter=(path / "adapter" / "adapters.safetensors").is_file(),
        )


def read_run(path: Path) -> Run:
    """Read everything in a run folder except its rollouts.

    Raises: ConfigError if there is no run in it.
    """
    return RunReader(path).read()


def newest_run(folder: Path) -> Path:
    """Return the run under a folder that was written to last.

    Raises: ConfigError if there is none.
    """
    runs = [marker.parent for marker in folder.glob(f"*/{MARKER}")]
    if not runs:
        raise ConfigError(
            f"There is no run under {folder}. Name the folder of one, or start one with "
            "`localrl train`."
        )
    return max(runs, key=lambda run: (_written(run), run.name))


def read_groups(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every readable line of a run's rollouts.jsonl with its byte offset."""
    file = GrowingFile(path / "rollouts.jsonl")
    for offset, line in file.added(lambda: None):
        record = group_of(line)
        if record is not None:
            yield offset, record


def read_groups_at(path: Path, offsets: Sequence[int]) -> Iterator[dict[str, Any] | None]:
    """Yield the groups that begin at these bytes; None for one that no longer exists."""
    if not offsets:
        return
    with (path / "rollouts.jsonl").open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            yield group_of(file.readline())


def _object(path: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return parsed(path.read_bytes()) or {}
    return {}


def _settings(path: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
        return {
            f"{section}.{name}": value
            for section, fields in sections.items()
            if isinstance(fields, dict)
            for name, value in fields.items()
        }
    return {}


def _is_step(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and not _is_score(line)


def _is_score(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and "eval/n" in line


def _scores(lines: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return the evaluations; events hold their answers, also those of lines cut by a resume."""
    details = {event.get("step"): event for event in events if event.get("kind") == EVALUATION}
    return [_score(line, details.get(line["step"], {})) for line in lines if _is_score(line)]


def _score(line: Mapping[str, Any], details: Mapping[str, Any]) -> Score:
    shown, passed = details.get("shown"), details.get("passed")
    temperature = _number(line.get("eval/temperature"))
    return Score(
        step=line["step"],
        pass_at_1=line.get("eval/pass@1"),
        n=line["eval/n"] or 0,
        mean_reward=line.get("eval/mean_reward"),
        mean_tokens=line.get("eval/mean_completion_tokens"),
        temperature=1.0 if temperature is None else temperature,
        prompts=str(details.get("prompts") or ""),
        seconds=_number(line.get("time/evaluation_s")),
        loss=_number(line.get("eval/loss")),
        demonstrations=int(details.get("demonstrations") or 0),
        passed=tuple(passed) if isinstance(passed, list) else (),
        shown=tuple(one for one in shown if isinstance(one, dict))
        if isinstance(shown, list)
        else (),
    )


def _written(run: Path) -> float:
    """Return when a run was last written to, in seconds since the epoch."""
    names = (MARKER, LOCK, "metrics.jsonl", "events.jsonl")
    return max(path.stat().st_mtime for name in names if (path := run / name).exists())


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _holder(lock: Path) -> tuple[str, bool | None]:
    """Return who last locked a run folder, and True if it still does; None if that is unknown.

    The lock is only tried if its writer is alive, so that no process just opening the run is turned
    away.
    """
    try:
        with lock.open(encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
            found = re.match(r"pid (\d+) on (.*)", text)
            if not found:
                return text, False
            if found[2] != socket.gethostname():
                return text, None
            return text, _is_alive(int(found[1])) and _is_locked(file)
    except OSError:
        return "", False


def _is_locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
