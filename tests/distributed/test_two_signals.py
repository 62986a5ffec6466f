"""A launcher that ends a rank sends two signals in a row; the rank still saves."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from waiting import DEADLINE_S, FOREVER_S

WAITING = """
import select, sys, time
from localrl.cli.signals import stop_on_signals
from localrl.errors import Stopped
from localrl.processes.heartbeat import Heartbeat
heartbeat = Heartbeat()
with stop_on_signals(heartbeat, patience_s=float(sys.argv[1])):
    print("ready", flush=True)
    while not heartbeat.reason:
        time.sleep(0.01)
    print("asked", flush=True)
    # Not a read that waits: a signal just before it would be handled only after it.
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
    print("saved", heartbeat.reason, flush=True)
"""


@pytest.mark.parametrize(
    ("patience", "second", "code"),
    [
        (str(FOREVER_S), signal.SIGTERM, 0),
        (str(FOREVER_S), signal.SIGINT, 130),
        ("0", signal.SIGTERM, 130),
    ],
    ids=["launcher", "ctrl-c", "impatient"],
)
def test_the_second_signal(patience, second, code):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, patience],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)  # SIGHUP is ignored under nohup, and stays so
    assert process.stdout.readline() == "asked\n"
    process.send_signal(second)
    if code:
        assert process.wait(DEADLINE_S) == code
        return
    out, _ = process.communicate("go on\n", timeout=DEADLINE_S)
    assert out == "saved SIGTERM\n"
    assert process.returncode == 0
