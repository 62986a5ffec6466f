"""The demonstration beside a process that spins: how much of its speed a taken core costs.

    python benchmarks/busy.py [ROUNDS]      writes benchmarks/busy.json; some minutes on two cores

In each round, in turn: one thread on the free machine, all threads there, and all threads beside
one process that spins. Seconds are of `localrl train` from its start to its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

LIMIT_S = 600
WAYS = {
    "one thread, free": ({"OPENBLAS_NUM_THREADS": "1"}, 0),
    "all threads, free": ({}, 0),
    "all threads, one process spins": ({}, 1),
}


def spinning(stack: ExitStack) -> None:
    """A process that does nothing but take its core, until the stack closes; it ends by itself."""
    code = f"import time; end = time.time() + {LIMIT_S}\nwhile time.time() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    stack.callback(process.wait)
    stack.callback(process.kill)


def took(environment: dict[str, str], spinners: int) -> float:
    """Seconds of the demonstration."""
    unset = ("OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for _ in range(spinners):
            spinning(stack)
        command = [sys.executable, "-m", "localrl", "train", "--out", f"{folder}/run"]
        start = time.perf_counter()
        subprocess.run(
            command, env={**kept, **environment}, check=True, capture_output=True, timeout=LIMIT_S
        )
        return time.perf_counter() - start


def main() -> None:
    """Measure, write and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            seconds[name].append(round(took(*way), 2))
            print(name, seconds[name][-1], flush=True)
    medians = {name: median(found) for name, found in seconds.items()}
    ratio = medians["all threads, one process spins"] / medians["one thread, free"]
    report = {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "seconds": seconds,
        "medians": medians,
        "beside a spinning process / one thread on the free machine": round(ratio, 2),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
