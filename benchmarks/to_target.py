"""Seconds and tokens until a tool has taught the embedded model its task.

    python benchmarks/to_target.py --environments DIR

The target: 90 % right answers among the last 128 completions of training. Every tool has its own
defaults for everything but the learning rate, the longest completion (64 tokens), the adapters
(rank 16 on all linear layers, scale 2) and the schedule (constant); each is tried at the same three
rates and judged by its best one. TRL and Unsloth also get localrl's shape of a step, 16 prompts x 2
completions. Environments as for side_by_side.py, results in benchmarks/to_target.jsonl.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from side_by_side import PEERS, pythons, watch
from side_by_side import RESULTS as SIDE_BY_SIDE
from side_by_side_page import read, write_page

RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
TARGET, TOKENS, LENGTH, RANK = 0.9, 64, 96, 16
SAME_SHAPE = "16 prompts x 2"
STEPS = 2000
"""More than the time allows."""


@dataclass(frozen=True)
class Way:
    """A tool and the shape of its steps."""

    name: str
    runner: str
    prompts: int
    group: int
    blas: bool = False


WAYS = (
    Way("localrl", "localrl", 16, 2),
    Way("TRL, 1 prompt x 8 (its default)", "trl", 1, 8),
    Way(f"TRL, {SAME_SHAPE}", "trl", 16, 2),
    Way("Unsloth MLX with the same BLAS, 1 prompt x 8", "unsloth", 1, 8, True),
    Way(f"Unsloth MLX with the same BLAS, {SAME_SHAPE}", "unsloth", 16, 2, True),
)


def run(
    way: Way, rate: float, seed: int, python: Path, work: Path, limit_s: float
) -> dict[str, Any]:
    """One run to the target, or to the end of the time."""
    out = work / "out.json"
    out.unlink(missing_ok=True)
    given = {
        "model": work / "model",
        "data": work / "steps.jsonl",
        "out": out,
        "steps": STEPS,
        "group": way.group,
        "prompts": way.prompts,
        "tokens": TOKENS,
        "max-length": LENGTH,
        "rank": RANK,
        "rate": rate,
        "seed": seed,
        "target": TARGET,
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    command = [str(python), str(PEERS / f"run_{way.runner}.py"), *flags, *["--blas"] * way.blas]
    start = time.monotonic()
    peak, problem = watch(command, limit_s)
    told = json.loads(out.read_text()) if out.exists() else {}
    return {
        "way": way.name,
        "rate": rate,
        "seed": seed,
        "wall_s": time.monotonic() - start,
        "peak_bytes": peak,
        "problem": problem,
        "limit_s": limit_s,
        "reached_s": told.get("reached_s"),
        "tokens": sum(told.get("tokens", [])),
        "completions": len(told.get("rewards", [])),
        "last_reward": _last(told.get("rewards", [])),
        "versions": told.get("versions", {}),
    }


def _last(rewards: list[float]) -> float | None:
    return sum(rewards[-128:]) / len(rewards[-128:]) if rewards else None


def section(results: list[dict[str, Any]]) -> str:
    """Part of docs/benchmarks.md."""
    best = sorted(_best_rates(results), key=lambda row: row[2])
    ours = next((row for row in best if row[0] == "localrl"), None)
    rows = [
        "| tool | best rate | seconds | each run | times ours | tokens | command, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rate, seconds, runs in best:
        there = [run for run in runs if run["reached_s"] is not None]
        if not there or ours is None:
            last = max((run["last_reward"] or 0.0 for run in runs), default=0.0)
            rows.append(f"| {name} | {rate:g} | not reached, at most {last:.2f} | | | | |")
            continue
        each = ", ".join(f"{run['reached_s']:.0f}" if run in there else "never" for run in runs)
        rows.append(
            f"| {name} | {rate:g} | {seconds:.0f} | {each} | {seconds / ours[2]:.1f} "
            f"| {median(run['tokens'] for run in there):,.0f} "
            f"| {median(run['wall_s'] for run in there):.0f} |"
        )
    limits = " or ".join(f"{limit:g}" for limit in sorted({run["limit_s"] for run in results}))
    rates = ", ".join(f"{rate:g}" for rate in sorted({run["rate"] for run in results}))
    return f"""## Time to 90 % on the embedded task

`steps`, the demonstration's task: until 90 % of the last 128 completions of training are right.
Each tool with its own defaults but for the learning rate (the best of {rates} is shown),
the longest completion (64), the adapters (rank 16, scale 2, all linear layers) and a constant
schedule; the others also with the step of localrl's demonstration, 16 prompts x 2, which is its
default here. "Seconds" are those of training, their median over seeds: one that did not get
there within {limits} s counts as infinite. "Tokens" and "command", the seconds of the whole
process, are medians of those that got there. TRL trains the same weights in float32.
Made by `benchmarks/to_target.py`. The aim was a third of the time of the best other tool, each with
its defaults. {_reached(best)}

{chr(10).join(rows)}"""


def _reached(best: list[tuple[str, float, float, list[dict[str, Any]]]]) -> str:
    """How the aim fares beside the other tools as they come, and in localrl's shape of a step."""
    seconds = {name: row[0] for name, _, *row in best}
    ours = seconds.pop("localrl", math.inf)
    own = [s for name, s in seconds.items() if not name.endswith(SAME_SHAPE)]
    same = [s for name, s in seconds.items() if name.endswith(SAME_SHAPE)]
    said = [
        f"the quickest {what} takes {min(found) / ours:.1f} times as long"
        for what, found in (("of them as it comes", own), ("in localrl's shape", same))
        if found and min(found) < math.inf and ours < math.inf
    ]
    return f"{'; '.join(said).capitalize()}." if said else "It was not reached."


def _best_rates(
    results: list[dict[str, Any]],
) -> Iterator[tuple[str, float, float, list[dict[str, Any]]]]:
    """Of each way: its name, its best rate, the median of its seconds there, and the runs."""
    for name in dict.fromkeys(run["way"] for run in results):
        found = []
        for rate in sorted({run["rate"] for run in results}):
            runs = [run for run in results if (run["way"], run["rate"]) == (name, rate)]
            if runs:
                times = [r["reached_s"] or float("inf") for r in runs]
                found.append((name, rate, median(times), runs))
        yield min(found, key=lambda row: row[2])


@click.command(help=__doc__)
@click.option("--environments", type=click.Path(path_type=Path), required=True)
@click.option("--rates", default="5e-4,2e-3,8e-3", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--ways", default="", help="Only those whose name holds this.")
@click.option("--limit", "limit_s", default=60.0, show_default=True, help="Seconds for each.")
@click.option("--keep", is_flag=True, help="Add to earlier results.")
def main(environments: Path, rates: str, seeds: str, ways: str, limit_s: float, keep: bool) -> None:
    """Run all in turn, then write the page if side_by_side.py has made one."""
    found = pythons(environments)
    if RESULTS.exists() and not keep:
        RESULTS.rename(RESULTS.with_suffix(f".{int(RESULTS.stat().st_mtime)}.jsonl"))
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a") as results:
        subprocess.run([sys.executable, str(PEERS / "make_embedded.py"), folder], check=True)
        for seed in map(int, seeds.split(",")):
            for rate in map(float, rates.split(",")):
                for way in WAYS:
                    if way.runner not in found or ways not in way.name:
                        continue
                    told = run(way, rate, seed, found[way.runner], Path(folder), limit_s)
                    results.write(json.dumps(told) + "\n")
                    results.flush()
                    when = told["reached_s"]
                    reached = f"{when:.0f} s" if when else told["problem"] or told["last_reward"]
                    click.echo(f"{seed} {rate:g} {way.name}: {reached}, {told['tokens']} tokens")
    if SIDE_BY_SIDE.exists():
        write_page()
    else:
        click.echo(section(read(RESULTS)))


if __name__ == "__main__":
    main()
