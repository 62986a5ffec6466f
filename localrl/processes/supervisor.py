"""The parent of a run: restarts it when it dies or stalls, and never loads MLX or NumPy.

It does little, so that nothing in the run can take it down. It knows the run only by the messages
of `localrl.processes.child`, the names of its checkpoints, and its exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localrl.processes.battery import Awake, Power, read_power
from localrl.processes.child import DISPLAY, OUT_OF_MEMORY, RELAX, VARIABLE, WATCHDOG, Restart
from localrl.processes.signals import StopRequest
from localrl.processes.stall_detector import StallDetector, StallLimits

EXPLAINED = {0, 1, 2, 3, 4, 5, 6, 75, 130}
"""Exit codes of a run that has reported its own reason: see `localrl.errors`."""
SAVED = 75
INTERRUPTED = 130
TICK_S = 1.0
HINTS = {
    "SIGABRT": "it aborted",
    "SIGKILL": "killed from outside, as the system does when memory is short",
    "SIGSEGV": "a fault in compiled code",
    "SIGBUS": "a fault in compiled code",
}

CLOSE = "Close other programs"

Command = Sequence[str]


def supervise(
    command: Command,
    resume: Callable[[str], Command],
    *,
    limits: StallLimits | None = None,
    power: Callable[[], Power | None] = read_power,
    pause: bool = True,
    awake: Awake | None = None,
) -> int:
    """Run a command, restarting it until it ends for an explained reason; return the exit code.

    resume: returns the command that continues the run in a folder. pause: True to wait while the
    battery is low.
    """
    awake = awake or Awake()
    with StopRequest() as stop_request:
        supervision = _Supervision(
            resume, limits or StallLimits(), power, pause, awake, stop_request
        )
        try:
            return supervision.run(command)
        finally:
            awake.end()


@dataclass(frozen=True)
class _End:
    code: int
    """Exit code; if negative, the signal that ended the process."""
    stalled_s: float | None
    """Seconds without a sign of life; None if the process did not end because of a stall."""


class _Supervision:
    def __init__(
        self,
        resume: Callable[[str], Command],
        limits: StallLimits,
        power: Callable[[], Power | None],
        pause: bool,
        awake: Awake,
        stop_request: StopRequest,
    ) -> None:
        self._resume, self._limits, self._stop_request = resume, limits, stop_request
        self._power, self._pause, self._awake = power, pause, awake
        self._run: str | None = None
        self._reasons: list[str] = []
        self._deaths, self._newest = 0, -1
        self._paused: str | None = None
        self._relaxed = False
        """True once processes are started with `RELAX`."""

    def run(self, command: Command) -> int:
        restart: Restart | None = None
        while self._enough_power():
            life = _Life(command, restart, relaxed=self._relaxed)
            self._stop_request.adopt(life.process)
            try:
                end = self._watch(life)
            finally:
                self._stop_request.adopt(None)
                life.close()
            after = self._after(end)
            if isinstance(after, int):
                return after
            restart = after
            command = self._resume(self._run) if self._run else command
        return SAVED if self._run else INTERRUPTED

    def _watch(self, life: _Life) -> _End:
        """Wait until the process has ended by itself, or end it because it was silent."""
        detector, looked = StallDetector(self._limits, time.monotonic()), float("-inf")
        tick_s = min(TICK_S, self._limits.floor_s)
        while life.process.poll() is None:
            if time.monotonic() - looked >= self._limits.power_every_s:
                looked = time.monotonic()
                self._mind_power(life)
            self._hear(life.listen(tick_s), detector)
            silence = detector.silence(time.monotonic())
            if silence is not None:
                _say(f"no sign of life for {silence:.0f} s; stopping the run")
                return _End(life.end(self._limits.grace_s), silence)
        self._hear(life.listen(0), detector)
        return _End(life.process.returncode, None)

    def _hear(self, messages: Sequence[dict[str, Any]], detector: StallDetector) -> None:
        for message in messages:
            detector.beat(time.monotonic())
            if "run" in message:
                self._run = message["run"]
            if "step" in message:
                detector.settled = True

    def _after(self, end: _End) -> int | Restart | None:
        """Return the exit code to end with, or the report to the next process."""
        if self._stop_request.number is not None:
            return self._ended(end.code)
        if end.stalled_s is not None:
            # A process that could still save when asked was not short of memory.
            silent = f"no sign of life for {end.stalled_s:.0f} s"
            return self._died(silent, unclean=end.code != SAVED)
        if self._paused and end.code == SAVED:
            return None
        if end.code in EXPLAINED or -end.code in self._stop_request.NUMBERS:
            return self._ended(end.code)
        if end.code == WATCHDOG:
            return self._ended_by_watchdog()
        return self._died(describe(end.code), unclean=True)

    def _ended(self, code: int) -> int:
        if code not in EXPLAINED:
            _say(f"the run was ended by {describe(code)}; saved checkpoints are intact")
        return code if code >= 0 else 128 - code

    def _ended_by_watchdog(self) -> int | Restart:
        """Continue with the same plan: memory was not short, and smaller batches are no cure."""
        reason, how = describe(WATCHDOG), f", with the same plan and {RELAX}=1"
        if self._relaxed or os.environ.get(RELAX) == "1":
            reason += f", although {RELAX} is 1"
        self._relaxed = True
        return self._died(reason, unclean=False, how=how, advice=DISPLAY)

    def _died(
        self, reason: str, *, unclean: bool, how: str = "", advice: str = CLOSE
    ) -> int | Restart:
        """Return the exit code if it died too often, or the report to the next process.

        how: what is new for that process, as words. advice: what the user can do about the reason.
        """
        newest = newest_step(self._run)
        if newest > self._newest:
            self._newest, self._reasons = newest, []
        self._reasons.append(reason)
        self._deaths += 1
        where = f"step {newest}" if newest >= 0 else "the beginning"
        if len(self._reasons) >= self._limits.deaths:
            _say(_given_up(self._reasons, where, self._run, advice))
            return 1
        count = f"death {len(self._reasons)} of {self._limits.deaths} without progress"
        more = "" if advice == CLOSE else f". {advice}"
        _say(f"warning: the run died: {reason}. It restarts from {where}{how} ({count}){more}")
        return Restart(reason, self._deaths, unclean, self._relaxed)

    def _mind_power(self, life: _Life) -> None:
        power = self._power()
        self._awake.update(power, life.process.pid)
        if self._pause and self._paused is None and power is not None and power.low:
            self._paused = f"the battery at {power.percent} %"
            life.ask(self._paused)

    def _enough_power(self) -> bool:
        """Wait for enough power, if configured; False if the user asked to stop."""
        told = False
        while self._stop_request.number is None:
            power = self._power() if self._pause else None
            if power is None or not power.low:
                self._paused = None
                return True
            if not told:
                _say(f"paused: battery at {power.percent} %; use --on-battery run to continue")
                told = True
            self._stop_request.wait(self._limits.power_every_s)
        return False


class _Life:
    """One process, and the supervisor's end of the socket."""

    def __init__(self, command: Command, restart: Restart | None, *, relaxed: bool) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            told = {"channel": fd, "restart": asdict(restart) if restart else None}
            variables = {VARIABLE: json.dumps(told), **({RELAX: "1"} if relaxed else {})}
            # In its own session, so that Ctrl-C reaches it only through the supervisor, and once.
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                start_new_session=True,
            )
        self._ours.setblocking(False)
        self._rest, self._open = b"", True

    def listen(self, timeout: float) -> list[dict[str, Any]]:
        """Return the messages received; waits for one, or for the end of the process."""
        if not self._open:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
            return []
        if not select.select([self._ours], [], [], timeout)[0]:
            return []
        try:
            data = self._ours.recv(1 << 16)
        except OSError:
            data = b""
        self._open = bool(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def ask(self, reason: str) -> None:
        """Ask the process to save and stop."""
        with contextlib.suppress(OSError):
            self._ours.send(json.dumps({"stop": reason}).encode() + b"\n")

    def end(self, grace_s: float) -> int:
        """End the process, and kill its session if it does not end in time; return its exit
        code."""
        self.process.terminate()
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()

    def close(self) -> None:
        """Close the socket: a process that is still alive saves and ends."""
        self._ours.close()


def describe(code: int) -> str:
    """Describe in words how a process ended."""
    if code == OUT_OF_MEMORY:
        return "it ran out of memory"
    if code == WATCHDOG:
        return "the GPU's watchdog ended its work, as macOS does for the sake of a shown display"
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"status {code}, which has no known meaning"
    return f"{name} ({HINTS[name]})" if name in HINTS else name


def newest_step(run: str | None) -> int:
    """Return the step of the newest checkpoint in a run folder; -1 if there is none."""
    if run is None:
        return -1
    names = (path.name for path in (Path(run) / "checkpoints").glob("step-*"))
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=-1)


def command_of(
    python: Sequence[str], arguments: Sequence[str], *, debug: bool, name: str = "train"
) -> list[str]:
    """Return the command of the child: this interpreter, a command of localrl, these arguments."""
    head = [*python, "-m", "localrl", *(["--debug"] if debug else [])]
    return [*head, name, "--no-supervise", *arguments]


def this_python() -> list[str]:
    """Return the interpreter's command, with the same module search path as this one."""
    # Without -P, -m would also search the current folder, which may contain anything.
    return [sys.executable] if sys.path[0] == os.getcwd() else [sys.executable, "-P"]


def _given_up(reasons: Sequence[str], where: str, run: str | None, advice: str) -> str:
    told = "".join(f"\n  {number}. {reason}" for number, reason in enumerate(reasons, start=1))
    again = f"localrl train --resume --out {shlex.quote(run)}" if run else "the same command"
    return (
        f"error: the run died {len(reasons)} times without getting past {where}:{told}\n"
        f"Saved checkpoints are intact. {advice}, then continue with: {again}"
    )


def _say(line: str) -> None:
    # The run must survive a terminal that is gone.
    with contextlib.suppress(OSError):
        print(f"\nlocalrl: {line}", file=sys.stderr, flush=True)
