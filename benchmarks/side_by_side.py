"""Measure localrl beside other tools: the same model, prompts, lengths and rewards, in turn.

    python benchmarks/side_by_side.py --environments DIR --machine "two x86-64 cores"

DIR holds one virtual environment for each tool, as benchmarks/peers/README.md makes them; a tool
without one is left out. Every measurement is a process of its own, with nothing beside it; the
tools take turns, so that a slow minute of the machine is everybody's. Results are kept in
benchmarks/side_by_side.jsonl line by line as they come; docs/benchmarks.md is made from them. Linux
only: memory is read in /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from localrl.runs.logs import read_jsonl

PEERS = Path(__file__).resolve().parent / "peers"
RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
TOKENS, GROUP = 64, 8
LENGTHS = {"short": 20, "long": 500}
"""Tokens of a job's prompts."""
POLL_S, GRACE_S = 0.1, 30.0
NO_COMPILE = {"MLX_DISABLE_COMPILE": "1", "MLX_TUNE_DISABLE_COMPILE": "1"}
"""On a Linux CPU compiling goes through a C++ compiler, a minute or more in the first step."""


@dataclass(frozen=True)
class Tool:
    """One that is measured."""

    name: str
    runner: str
    """Of `run_<runner>.py`; also the name of its environment."""
    mlx: bool = True


LOCALRL = Tool("localrl", "localrl")
TOOLS = (
    LOCALRL,
    Tool("TRL", "trl", mlx=False),
    Tool("Unsloth MLX", "unsloth"),
    Tool("inductive-mlxrl", "mlxrl"),
    Tool("mlx-lm-lora", "mlx_lm_lora"),
    Tool("mlx-tune", "mlx_tune"),
)


@dataclass(frozen=True)
class Measurement:
    """One process."""

    tool: Tool
    job: str
    blas: bool
    """Whether localrl's BLAS stands in front of MLX's own. localrl and TRL have their own."""
    steps: int


@dataclass
class Result:
    """What came of it."""

    tool: str
    job: str
    blas: bool
    round: int
    wall_s: float
    """Of the whole process, imports and loading included."""
    peak_bytes: int
    """Most resident memory of the process and its children together."""
    load: float
    """Average number of processes that wanted a core in the minute before."""
    problem: str | None = None
    """The last line it printed, where it failed."""
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def plan(tools: list[Tool], jobs: list[str], turn: int, steps: int, slow: int) -> list[Measurement]:
    """The measurements of one round. slow: rounds of MLX tools as installed with long prompts."""
    found = []
    for job in jobs:
        for tool in tools:
            if not tool.mlx or tool is LOCALRL:
                found.append(Measurement(tool, job, False, steps))
                continue
            found.append(Measurement(tool, job, True, steps))
            if job == "short" or turn < slow:
                # Two steps: the second is the one that counts, and takes half a minute.
                found.append(Measurement(tool, job, False, 2))
    return found


def run(wish: Measurement, turn: int, python: Path, work: Path, limit_s: float) -> Result:
    """One measurement in a process of its own."""
    out = work / "out.json"
    out.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    command = [str(python), str(PEERS / f"run_{wish.tool.runner}.py"), *_arguments(wish, work, out)]
    start = time.monotonic()
    peak, problem = watch(command, limit_s)
    wall_s = time.monotonic() - start
    told = json.loads(out.read_text()) if out.exists() else {}
    if not told and problem is None:
        problem = "it wrote no result"
    kept = {name: told[name] for name in ("seconds", "tokens", "counts", "versions") if told}
    return Result(wish.tool.name, wish.job, wish.blas, turn, wall_s, peak, load, problem, **kept)


def _arguments(wish: Measurement, work: Path, out: Path) -> list[str]:
    given = {
        "model": work / "model",
        "data": work / f"{wish.job}.jsonl",
        "out": out,
        "steps": wish.steps,
        "group": GROUP,
        "tokens": TOKENS,
        "max-length": LENGTHS[wish.job] + TOKENS,
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return flags + ["--blas"] * wish.blas


def watch(command: list[str], limit_s: float) -> tuple[int, str | None]:
    """Run it; the most memory that it and its children held, and what it said if it failed."""
    peak, deadline = 0, time.monotonic() + limit_s
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, **NO_COMPILE}
        )
        while process.poll() is None and time.monotonic() < deadline:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(POLL_S)
        if process.poll() is None:
            _end(process)
            return peak, f"not done after {limit_s:.0f} s"
        said.seek(0)
        lines = said.read().strip().splitlines() or [""]
    return peak, lines[-1][:300] if process.returncode else None


def _end(process: subprocess.Popen) -> None:
    """Let it keep what it has; after a while, end it."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tree_bytes(root: int) -> int:
    """Resident memory of a process and all below it; 0 where there is no /proc."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for pid, parent, size in _processes():
        children.setdefault(parent, []).append(pid)
        resident[pid] = size
    whole, todo = 0, [root]
    while todo:
        pid = todo.pop()
        whole += resident.get(pid, 0)
        todo += children.get(pid, [])
    return whole


def _processes() -> Iterator[tuple[int, int, int]]:
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while it is looked at
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            # Fields 4 and 24 of proc(5): the parent, and resident pages.
            yield int(entry.name), int(after_name[1]), int(after_name[21]) * page


def pythons(environments: Path) -> dict[str, Path]:
    """The Python of each tool that has an environment."""
    found = {"localrl": Path(sys.executable)}
    for tool in TOOLS[1:]:
        python = environments / tool.runner / "bin" / "python"
        if python.exists():
            found[tool.runner] = python
        else:
            click.echo(f"left out: {tool.name}, there is no {python}")
    return found


def measure(
    found: dict[str, Path], jobs: list[str], rounds: int, steps: int, slow: int, limit_s: float
) -> None:
    """All rounds; each result is kept as it comes."""
    tools = [tool for tool in TOOLS if tool.runner in found]
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a") as results:
        work = Path(folder)
        subprocess.run([sys.executable, str(PEERS / "make_model.py"), folder], check=True)
        before = max((line["round"] for line in read_jsonl(RESULTS)), default=-1) + 1
        for turn in range(before, before + rounds):
            for wish in plan(tools, jobs, turn, steps, slow):
                result = run(wish, turn, found[wish.tool.runner], work, limit_s)
                results.write(json.dumps(asdict(result)) + "\n")
                results.flush()
                _tell(result)


def _tell(result: Result) -> None:
    what = f"{result.round} {result.job:6}{result.tool:16}{'+ BLAS' if result.blas else '':7}"
    took = " ".join(f"{seconds:.2f}" for seconds in result.seconds)
    click.echo(f"{what}{result.problem or took}  {result.peak_bytes / 2**20:.0f} MiB")


@click.command(help=__doc__)
@click.option("--environments", type=click.Path(path_type=Path), required=True)
@click.option("--machine", required=True, help="What it runs on, in words.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=4, show_default=True, help="The first one is not counted.")
@click.option("--jobs", default="short,long", show_default=True)
@click.option(
    "--slow-rounds",
    default=1,
    show_default=True,
    help="Rounds of the long job with MLX tools as installed, minutes each.",
)
@click.option("--limit", "limit_s", default=900.0, show_default=True, help="Seconds for each.")
@click.option("--keep", is_flag=True, help="Add to earlier results.")
def main(
    environments: Path,
    machine: str,
    rounds: int,
    steps: int,
    jobs: str,
    slow_rounds: int,
    limit_s: float,
    keep: bool,
) -> None:
    """Measure, then write the page."""
    from side_by_side_page import write_page

    if RESULTS.exists() and not keep:
        RESULTS.rename(RESULTS.with_suffix(f".{int(RESULTS.stat().st_mtime)}.jsonl"))
    about: dict[str, Any] = {
        "machine": machine,
        "cores": len(os.sched_getaffinity(0)),
        "started": time.strftime("%Y-%m-%d"),
    }
    RESULTS.with_suffix(".machine.json").write_text(json.dumps(about) + "\n")
    measure(pythons(environments), jobs.split(","), rounds, steps, slow_rounds, limit_s)
    write_page()


if __name__ == "__main__":
    main()
