"""Run the README's first command for several seeds; write docs/demonstration.md and its picture.

    python benchmarks/demonstration.py            # three seeds, about a minute on two cores

Each run is `localrl train --seed S`, a process of its own, with nothing else running.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from localrl.runs.logs import read_jsonl

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Run:
    """One seed's run."""

    seed: int
    folder: Path
    whole_s: float
    steps: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def train_s(self) -> float:
        """Seconds in training steps."""
        return sum(step["step_time"] for step in self.steps)


def run(seed: int, out: Path) -> Run:
    """Train with this seed and read what the run left behind."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "localrl", "train", "--seed", str(seed), "--out", str(out)],
        check=True,
    )
    whole_s = time.monotonic() - started
    return read(seed, out, whole_s)


def read(seed: int, out: Path, whole_s: float) -> Run:
    """A finished run."""
    steps = [line for line in read_jsonl(out / "metrics.jsonl") if "reward" in line]
    evaluation = json.loads((out / "eval.json").read_text())
    return Run(seed, out, whole_s, steps, evaluation)


def table(runs: list[Run]) -> str:
    """One row per seed."""
    lines = [
        "| seed | pass@1 before | pass@1 after | 95 % interval | steps | training, s | command, s "
        "| process, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in runs:
        base, adapter = each.evaluation["base"], each.evaluation["adapter"]
        low, high = adapter["ci95"]
        memory = max(step["memory/resident_bytes"] or 0 for step in each.steps) / 2**20
        lines.append(
            f"| {each.seed} | {base['pass@1']:.3f} | {adapter['pass@1']:.3f} "
            f"| {low:.3f} to {high:.3f} | {len(each.steps)} | {each.train_s:.0f} "
            f"| {each.whole_s:.0f} | {memory:.0f} |"
        )
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Rewards and lengths of the steps: each faintly, the mean of the last five boldly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for n, each in enumerate(runs):
        numbers = [step["step"] for step in each.steps]
        for axes, name in ((left, "reward"), (right, "completions/mean_length")):
            values = [step[name] for step in each.steps]
            axes.plot(numbers, values, color=f"C{n}", alpha=0.25, linewidth=1)
            smooth = [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            axes.plot(numbers, smooth, color=f"C{n}", label=f"seed {each.seed}", linewidth=2)
    left.set(xlabel="step", ylabel="mean reward of the step", ylim=(0, 1), title="Right answers")
    right.set(xlabel="step", ylabel="tokens", title="Length of completions")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def page(runs: list[Run], machine: str) -> str:
    """docs/demonstration.md."""
    n = runs[0].evaluation["n"]
    return f"""# The demonstration, measured

`localrl train`, no arguments but `--seed`: the embedded model, the task `steps`, 16 prompts x 2
completions a step. pass@1 is one completion for each of {n} held-out prompts at temperature 1, the
same prompts and draws for every seed. Measured on: {machine}.
Made by `benchmarks/demonstration.py`.

{table(runs)}

![Mean reward and completion length over training](demonstration.png)

Thin lines are single steps of 32 completions, thick ones the mean of the last five steps.

Completions grow because the model stops guessing and works every step. "Training" is the sum of the
step times; "command" also holds the start, both evaluations and writing the adapter; "process" is
the most memory that the process held at the end of a step.
"""


@click.command(help=__doc__)
@click.option("--seeds", default="0,1,2", help="Comma-separated.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demonstration"))
@click.option("--machine", required=True, help="What it runs on, in words.")
def main(seeds: str, out: Path, machine: str) -> None:
    """Run, then write the page and the picture."""
    runs = [run(int(seed), out / f"seed-{seed}") for seed in seeds.split(",")]
    draw(runs, DOCS / "demonstration.png")
    (DOCS / "demonstration.md").write_text(page(runs, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
