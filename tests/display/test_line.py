"""The line that shows what goes on, in a real terminal of 80 columns and without one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from waiting import DEADLINE_S

from localrl.display import line as module
from localrl.display.line import Picture, StatusLine, _fitting, elapsed, picture_of, showing
from localrl.records import Work

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("room", "text"), [(40, "a left, reward 1, 7 tok/s"), (16, "a left, reward 1"), (5, "")]
)
def test_facts_that_do_not_fit_are_left_out(room, text):
    assert _fitting(["a left", "reward 1", "7 tok/s"], room) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "01:00"), (4000, "1:06:40")]
)
def test_durations(seconds, text):
    assert elapsed(seconds) == text


def test_work_in_words():
    assert picture_of(None, 3) == Picture("starting", facts=["3 s"])
    found = picture_of(Work("sampling", 3, 8, tokens=1200), 75)
    assert found == Picture("sampling", 3, 8, ["3/8", "01:15", "1,200 tokens"])


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.2)
    monkeypatch.setattr(module, "REFRESH_S", 0.05)
    line = StatusLine(lambda: Picture("loading", facts=["7 s"]))
    deadline = time.monotonic() + DEADLINE_S
    found = ""
    while found.count("loading: 7 s") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        found += capsys.readouterr().err
    line.close()
    assert found.count("loading: 7 s") >= 2
    time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_a_quick_command_shows_nothing(capsys):
    with showing("looking") as status:
        status.now("looking closer")
        status.echo("found")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("found\n", "")


def in_terminal(arguments, columns, folder):
    """Run the command in a terminal of this width; return each piece it drew, and when."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "localrl", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(theirs)
    drawn = []
    try:
        while piece := _read(mine):
            drawn.append((time.monotonic() - started, piece))
        assert child.wait(DEADLINE_S) == 0
    finally:
        child.kill()
        os.close(mine)
    return drawn


def _read(fd):
    try:
        return os.read(fd, 65536)
    except OSError:  # the child has closed it
        return b""


def test_a_run_in_a_terminal_of_80_columns(tmp_path):
    few = ["--set", "task.eval_prompts=64"]
    arguments = ["train", "--no-supervise", "--steps", "2", "--out", "run", *few]
    drawn = in_terminal(arguments, 80, tmp_path)
    text = b"".join(piece for _, piece in drawn).decode()
    parts = [part.rstrip() for part in re.split("[\r\n]", text)]
    bars = [part for part in parts if part.startswith(("evaluating", "step"))]
    assert any(part.startswith("evaluating before training") for part in parts)
    steps = [part for part in bars if part.startswith("step 2/2 |")]
    assert steps
    assert all(len(part) < 80 for part in bars if "|" in part)
    assert any(re.search(r"\| \d+ s left, reward 0\.\d{3}", part) for part in steps)
    assert "step 2/2" not in text[text.rindex("after step 2: pass@1") :]
