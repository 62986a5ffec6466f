"""Several ranks beside one, and what a network would add, for docs/several-machines.md.

    python benchmarks/ranks.py > benchmarks/ranks.json

Runs the same job alone and as two processes, each with one BLAS thread, in turn. They are started
as `mlx.launch` would, without it: its own loop keeps a core busy that a rank could use. The jobs: a
random Qwen3 of 7.3 million weights, 16 prompts, groups of 8, 64 new tokens; and the demonstration.
Prints one JSON object; `--table` prints the estimate from an earlier one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from localrl.memory.known_models import find_known
from localrl.memory.sizes import lora_parameters, read_sizes
from localrl.runs.logs import read_jsonl

HERE = Path(__file__).resolve().parent
STEPS = 5
ALWAYS = {"run.eval_every": 0, "memory.threads": 1, "run.steps": STEPS, "task.eval_prompts": 0}
RANDOM = {
    "rollout.group_size": 8,
    "rollout.prompts_per_step": 16,
    "rollout.max_completion_tokens": 64,
    "lora.rank": 8,
}
REWARD = (
    "def score(completion_ids, **kwargs):\n"
    "    return [sum(ids) % 7 / 7 for ids in completion_ids]\n"
)


@dataclass(frozen=True)
class Link:
    """What is assumed of a network."""

    name: str
    bytes_per_s: float
    latency_s: float


LINKS = (
    Link("Wi-Fi", 20e6, 5e-3),
    Link("Gigabit Ethernet", 115e6, 0.3e-3),
    Link("Thunderbolt", 1.5e9, 0.1e-3),
)
COLLECTIVES = 12
"""Of a step: groups, gradient, its sums, drift, and what is told at its end. What is gathered takes
two, since lengths go first; what is added up takes two more, to see that it is the same everywhere.
"""
BYTES_PER_TOKEN = 20
"""Of groups on their way: id, log-probability, entropy, a flag, and a share of the text."""


def run(folder: Path, size: int, arguments: Sequence[str]) -> tuple[list[dict[str, float]], int]:
    """Tokens and seconds of each step of one run, but for the first; and bytes of its adapters."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    command = [sys.executable, "-m", "localrl", "train", "--out", str(out), *arguments]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    if size == 1:
        command.append("--no-supervise")
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port + 1 + rank}"] for rank in range(size)]))
        environment["MLX_HOSTFILE"] = str(hosts)
    ranks = [
        subprocess.Popen(
            command,
            env=environment | ({"MLX_RANK": str(rank)} if size > 1 else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(size)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise click.ClickException("A rank has failed.")
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "reward" in line]
    steps = [{"tokens": m["rollout/tokens"], "seconds": m["step_time"]} for m in lines[1:]]
    return steps, (out / "adapter" / "adapters.safetensors").stat().st_size


def compare(folder: Path, arguments: Sequence[str], rounds: int) -> dict[str, Any]:
    """Tokens per second of one rank and of two, taking turns."""
    found: dict[int, list[float]] = {1: [], 2: []}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    tokens, gradient = 0.0, 0
    for _ in range(rounds):
        for size in (1, 2):
            steps, gradient = run(folder, size, arguments)
            tokens = median(s["tokens"] for s in steps)
            found[size].append(sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps))
            seconds[size].append(median(s["seconds"] for s in steps))
    return {
        "tokens_per_s": {size: median(values) for size, values in found.items()},
        "step_s": {size: median(values) for size, values in seconds.items()},
        "step_tokens": tokens,
        "gradient_bytes": gradient,
        "ratio": median(two / one for one, two in zip(found[1], found[2], strict=True)),
        "ratios": [two / one for one, two in zip(found[1], found[2], strict=True)],
    }


def words(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def seconds_added(link: Link, size: int, gradient: float, groups: float) -> float:
    """Of a step over a ring of `size` machines.

    A ring sends 2 (N - 1) / N of what is added up over each connection, and (N - 1) / N of what is
    gathered; each collective takes N - 1 turns one way, a sum twice as many.
    """
    sent = (2 * gradient + groups) * (size - 1) / size
    return sent / link.bytes_per_s + COLLECTIVES * 1.5 * (size - 1) * link.latency_s


def table(step_s: float, gradient: float, groups: float) -> str:
    """Times as fast as one machine, by network and number of machines."""
    rows = ["| | 2 machines | 4 machines | 8 machines |", "|---|---|---|---|"]
    for link in LINKS:
        cells = []
        for size in (2, 4, 8):
            took = step_s / size + seconds_added(link, size, gradient, groups)
            cells.append(f"{took:.2f} s, {step_s / took:.1f}x")
        rows.append(f"| {link.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--table", "results", type=click.Path(path_type=Path), help="An earlier result.")
def main(rounds: int, results: Path | None) -> None:
    """Measure, or print the estimate."""
    if results is not None:
        tell(json.loads(results.read_text()))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, str(HERE / "peers" / "make_model.py"), name], check=True)
        (folder / "reward.py").write_text(REWARD)
        own = ["--model", f"{name}/model", "--task", f"{name}/short.jsonl"]
        own += ["--reward", f"{name}/reward.py:score", *words(ALWAYS | RANDOM)]
        told = {
            "random": compare(folder, own, rounds),
            "demonstration": compare(folder, words(ALWAYS), rounds),
            "load": os.getloadavg(),
        }
    click.echo(json.dumps(told, indent=2))


def tell(measured: dict[str, Any]) -> None:
    """The tables for the page."""
    job = measured["random"]
    click.echo(f"measured: {json.dumps(job)}\n")
    groups = BYTES_PER_TOKEN * job["step_tokens"]
    click.echo(table(job["step_s"]["1"], job["gradient_bytes"], groups))
    for name in ("Qwen3-0.6B", "Qwen3-8B"):
        shape = find_known(name)
        assert shape is not None
        gradient = 4 * lora_parameters(read_sizes(shape), 16)
        click.echo(f"\n{name}, rank 16: gradient {gradient / 1e6:.0f} MB, steps of 60 s\n")
        click.echo(table(60.0, gradient, BYTES_PER_TOKEN * 32 * 256))


if __name__ == "__main__":
    main()
