"""Several real processes over MLX's ring on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from waiting import DEADLINE_S

TESTS = Path(__file__).parent


def free_ports(count: int) -> int:
    """The first of several ports in a row that are free now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            first = server.getsockname()[1]
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first


def environments(folder: Path, size: int) -> list[dict[str, str]]:
    """What `mlx.launch` would tell each of so many ranks."""
    first = free_ports(size + 1)
    hosts = folder / f"hosts-{first}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + 1 + rank}"] for rank in range(size)]))
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    common = {"MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    return [{**os.environ, **common, "MLX_RANK": str(rank)} for rank in range(size)]


def start(
    folder: Path, size: int, arguments: Sequence[str], places: Sequence[Path] = ()
) -> list[subprocess.Popen[str]]:
    """The same Python command on every rank; the output of each is in `rank-N.txt`.

    places: the working folder of each, by default `folder`.
    """
    found = []
    for rank, environment in enumerate(environments(folder, size)):
        with (folder / f"rank-{rank}.txt").open("w") as file:
            found.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment,
                    cwd=places[rank] if places else folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return found


def said(folder: Path, rank: int) -> str:
    """What a rank has printed."""
    return (folder / f"rank-{rank}.txt").read_text()


def run(
    folder: Path, size: int, arguments: Sequence[str], places: Sequence[Path] = ()
) -> list[str]:
    """Run to the end, which must be a good one; what each has printed."""
    processes = start(folder, size, arguments, places)
    codes = ends(processes)
    told = [said(folder, rank) for rank in range(size)]
    assert codes == [0] * size, "\n".join(told)
    return told


def ends(processes: Sequence[subprocess.Popen[str]], timeout: float = DEADLINE_S) -> list[int]:
    """How each has ended; none is left behind."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        kill(processes)


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End them, also one that was stopped with SIGSTOP."""
    for process in processes:
        process.kill()
        process.wait()
