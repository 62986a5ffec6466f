"""Watch commands in a terminal of 80 columns: how long does nothing change on the screen?

    localrl pull smollm2-135m
    python benchmarks/watched.py --machine "one x86-64 core"

Each command runs on SmolLM2-135M in a pseudo-terminal, on one processor with one thread, as slowly
as a larger model on more. A change is another text on the screen, not merely bytes. Writes
docs/transcript.md: the longest time without one, and what was to be read.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from localrl.utils.cache import cache_folder

PAGE = Path(__file__).parent.parent / "docs" / "transcript.md"
COLUMNS, ROWS = 80, 40
LIMIT_S = 5.0
"""Longest time in which nothing may change."""
SHOWN_EVERY_S = 4.0
"""Time between two states of the status line in the transcript."""
MODEL = ("--model", "smollm2-135m")
SMALL = (
    *("--set", "rollout.prompts_per_step=4", "--set", "rollout.max_completion_tokens=64"),
    *("--set", "rollout.temperature=0.7", "--set", "task.eval_prompts=16"),
)
COMMANDS = (
    ("train", *MODEL, "--task", "extraction:1", "--steps", "2", *SMALL, "--out", "RUN"),
    ("eval", "RUN", "--prompts", "16"),
    ("doctor", *MODEL),
    ("export", "RUN", "--fused", "--out", "FUSED"),
    ("chat", "RUN"),
)
ASKED = "The home of Ada Dubois is in Oslo. Where does she live?"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


@dataclass
class Screen:
    """The lines of a terminal, as far as `\\r` and `\\n` tell them, and when they changed."""

    started: float
    done: list[str] = field(default_factory=list)
    line: str = ""
    changed: float = 0.0
    longest: tuple[float, str] = (0.0, "")
    """Longest time without a change, and the line that stood there."""
    shown: float = -SHOWN_EVERY_S
    transcript: list[str] = field(default_factory=list)

    def write(self, text: str) -> None:
        """Apply output."""
        for part in re.split(r"(\r\n|\n|\r)", ESCAPE.sub("", text)):
            if part in ("\n", "\r\n"):
                self._note(self.line, whole=True)
                self.done.append(self.line)
                self.line = ""
            elif part == "\r":
                self.line = ""
            elif part:
                self.line += part
                self._note(self.line, whole=False)

    def _note(self, line: str, *, whole: bool) -> None:
        now = time.monotonic() - self.started
        last = self.transcript[-1][8:] if self.transcript else None
        if not line.strip() or line == last:
            return
        if (gap := now - self.changed) > self.longest[0]:
            self.longest = (gap, last or "(nothing yet)")
        self.changed = now
        if whole or now - self.shown > SHOWN_EVERY_S:
            self.transcript.append(f"{now:6.1f}  {line}")
            self.shown = now


def watch(words: tuple[str, ...], said: str) -> tuple[int, Screen]:
    """Run a command in a terminal; `said` is typed once something was printed."""
    child, terminal = pty.fork()
    if child == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-m", "localrl", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen, waiting = Screen(time.monotonic()), said
    while True:
        ready, _, _ = select.select([terminal], [], [], 0.2)
        if not ready:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the other end was closed
            break
        screen.write(data.decode(errors="replace"))
        if waiting and "> " in screen.line + "".join(screen.done[-1:]):
            os.write(terminal, waiting.encode())
            waiting = ""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), screen


@click.command(help=__doc__)
@click.option("--machine", required=True, help="What it runs on, in words.")
def main(machine: str) -> None:
    """Watch all commands, then write the page."""
    parts, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for words in COMMANDS:
            places = {"RUN": f"{folder}/run", "FUSED": f"{folder}/fused"}
            said = f"{ASKED}\n\x04" if words[0] == "chat" else ""
            code, screen = watch(tuple(places.get(word, word) for word in words), said)
            seconds, line = screen.longest
            failed |= code != 0 or seconds > LIMIT_S
            command = "localrl " + " ".join(words)
            click.echo(f"{seconds:4.1f} s at most without a change, exit {code}: {command}")
            text = "\n".join(screen.transcript).replace(folder, "")
            text = text.replace(str(cache_folder()), "~/.cache/localrl")
            parts.append(
                f"## `{words[0]}`\n\n`{command}`: at most {seconds:.1f} s without a change, while "
                f"the line read `{line.strip()[:COLUMNS].replace(folder, '')}`.\n\n"
                f"```text\n{text}\n```\n"
            )
    PAGE.write_text(
        "# What is to be seen while a command works\n\n"
        f"Five commands on SmolLM2-135M in a terminal of {COLUMNS} columns, with one thread, on "
        f"{machine}. On the left: seconds since the command began. The status line is shown every "
        f"{SHOWN_EVERY_S:g} seconds here; on the screen it changes twice a second. Made by "
        "`benchmarks/watched.py`.\n\n" + "\n".join(parts),
        encoding="utf-8",
    )
    sys.exit(failed)


if __name__ == "__main__":
    main()
