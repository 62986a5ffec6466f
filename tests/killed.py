"""Runs that are killed at random moments, and go on until they are done."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

# A process that has imported everything and computed nothing, so that a run costs a fork.
SERVER = """
import json, os, sys
import mlx_lm.utils, mlx_lm.models.qwen3, localrl.processes.worker
from localrl.cli.signals import stop_on_signals
from localrl.config import RunConfig
from localrl.errors import Stopped
from localrl.processes.heartbeat import Heartbeat
from localrl.train import train
for line in sys.stdin:
    settings = json.loads(line)
    pid = os.fork()
    if pid == 0:
        resume, heartbeat = os.path.exists(settings["run.out"] + "/config.toml"), Heartbeat()
        try:
            with stop_on_signals(heartbeat):
                # A run that was killed before it had settings is moved aside.
                config = RunConfig.create(settings)
                train(config, resume=resume, overwrite=not resume, heartbeat=heartbeat)
            os._exit(0)
        except Stopped:
            os._exit(75)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Killer:
    """Starts a run again and again and kills it after random times, until it has been enough."""

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        self.settings, self.random = settings, Random(seed)
        self.kills = 0
        self.whole_s = 0.0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        for stream in (self.server.stdin, self.server.stdout):
            assert stream is not None
            stream.close()
        self.server.wait()

    def whole(self, out: Path) -> None:
        """One run without a kill; the others are killed within the time that it took."""
        started = time.monotonic()
        self.run(out, kills=0)
        self.whole_s = time.monotonic() - started

    def run(self, out: Path, *, kills: int, number: int = signal.SIGKILL) -> None:
        """One run to its end, with at most so many kills on the way."""
        left = kills
        while self.once(out, kill=left > 0, number=number) != 0:
            left -= 1

    def once(self, out: Path, *, kill: bool, number: int) -> int:
        """Start or resume; kill after a random time. The exit code; a kill's is negative."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({**self.settings, "run.out": str(out)}) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        if kill:
            time.sleep(self.random.uniform(0.0, self.whole_s))
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, number)
        code = int(self.server.stdout.readline())
        assert code in (0, 75, -number), f"the run ended with {code}"
        self.kills += code != 0
        return code
