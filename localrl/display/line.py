"""The line at the bottom of a terminal, refreshed by a thread while other work goes on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from localrl.processes.heartbeat import Heartbeat
from localrl.records import Work

REFRESH_S = 0.5
"""Seconds between two refreshes of the line on a terminal."""
PATIENCE_S = 2.0
"""Seconds that a command may take before anything is shown."""
PLAIN_EVERY_S = 20.0
"""Seconds without any output after which a plain line is printed where there is no terminal."""
NARROW, NARROW_BAR, BAR = 100, 10, 30
"""Columns below which the bar is short, and the columns of a short and of a long one."""


@dataclass(frozen=True)
class Picture:
    """The content of the line: a title, a bar unless `total` is 0, and facts."""

    title: str
    done: float = 0
    total: float = 0
    facts: Sequence[str] = ()
    """The most important ones first; those that do not fit are left out."""


def picture_of(work: Work | None, seconds: float) -> Picture:
    """Describe work that began this many seconds ago, without a run around it."""
    if work is None:
        return Picture("starting", facts=[elapsed(seconds)])
    tokens = [f"{work.tokens:,} tokens"] if work.tokens else []
    counts = [f"{work.done:,}/{work.total:,}"] if work.total else []
    return Picture(work.name, work.done, work.total, [*counts, elapsed(seconds), *tokens])


def elapsed(seconds: float) -> str:
    """Write a duration as 41 s, 12:05 or 1:12:05."""
    return f"{seconds:.0f} s" if seconds < 59.5 else str(tqdm.format_interval(round(seconds)))


class _Bar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar whose text is a `Picture`."""

    picture = Picture("")

    @property
    def format_dict(self) -> Any:
        """Return tqdm's values, with the picture's text fitted to the width."""
        found: Mapping[str, Any] = super().format_dict
        width = found["ncols"] or NARROW
        size = NARROW_BAR if width < NARROW else BAR
        bar = f"{{desc}} |{{bar:{size}}}| {{text}}" if self.picture.total else "{desc} {text}"
        room = width - len(self.picture.title) - (size + 4 if self.picture.total else 1)
        return {**found, "bar_format": bar, "text": _fitting(self.picture.facts, room - 1)}


def _fitting(facts: Sequence[str], room: int) -> str:
    """Join as many of the facts as fit, in their order."""
    text = ""
    for fact in facts:
        longer = f"{text}, {fact}" if text else fact
        if len(longer) > room:
            break
        text = longer
    return text


class StatusLine:
    """Shows a picture until it is closed; other output goes through `write`.

    picture: returns the current one; called from a thread. patience_s: seconds before the first.
    """

    def __init__(self, picture: Callable[[], Picture], *, patience_s: float = 0.0) -> None:
        self._picture = picture
        self._patience_s = patience_s
        self._bar: _Bar | None = None
        self._written = time.monotonic()
        self._closing = threading.Event()
        self.terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    def write(self, text: str, *, err: bool = True) -> None:
        """Print a line above this one, to stderr or stdout."""
        self._written = time.monotonic()
        tqdm.write(text, file=sys.stderr if err else sys.stdout)

    def refresh(self) -> None:
        """Draw the line now; does nothing without a terminal."""
        if not self.terminal:
            return
        with tqdm.get_lock():
            if self._closing.is_set():
                return
            picture = self._picture()
            if self._bar is None:
                self._bar = _Bar(leave=False, dynamic_ncols=True, miniters=1, file=sys.stderr)
            self._bar.picture = picture
            self._bar.total, self._bar.n = picture.total or None, picture.done
            self._bar.set_description_str(picture.title, refresh=False)
            self._bar.refresh()

    def close(self) -> None:
        """Remove the line."""
        with tqdm.get_lock():
            self._closing.set()
            if self._bar is not None:
                self._bar.close()
        self._thread.join()

    def _run(self) -> None:
        pause = self._patience_s or REFRESH_S
        while not self._closing.wait(pause):
            pause = REFRESH_S
            if self.terminal:
                self.refresh()
            elif time.monotonic() - self._written > PLAIN_EVERY_S:
                picture = self._picture()
                self.write(f"{picture.title}: {', '.join(picture.facts)}")


@dataclass(frozen=True, eq=False)
class Status:
    """The work of a command, shown while it lasts."""

    heartbeat: Heartbeat
    _line: StatusLine

    def now(self, name: str) -> None:
        """Name what is done next."""
        self.heartbeat.beat(Work(name))

    def echo(self, text: str, *, err: bool = False) -> None:
        """Print a line to stdout, or stderr, above the status."""
        self._line.write(text, err=err)


@contextmanager
def showing(name: str) -> Iterator[Status]:
    """Show what a command does, if it takes longer than `PATIENCE_S`. name: what it does first."""
    heartbeat = Heartbeat()
    heartbeat.beat(Work(name))
    line = StatusLine(WorkClock(heartbeat).picture, patience_s=PATIENCE_S)
    try:
        yield Status(heartbeat, line)
    finally:
        line.close()


class WorkClock:
    """Measures how long the present work has been going on."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._name: str | None = None
        self._since = time.monotonic()

    def read(self) -> tuple[Work | None, float]:
        """Return the present work and the seconds since its name was first seen."""
        work = self._heartbeat.work
        name = work.name if work else None
        if name != self._name:
            self._name, self._since = name, time.monotonic()
        return work, time.monotonic() - self._since

    def forget(self) -> None:
        """Take the present work as done."""
        self._heartbeat.work = None

    def picture(self) -> Picture:
        """Describe the present work."""
        return picture_of(*self.read())
