"""Flat groups against trees at equal generated tokens; writes benchmarks/trees.md and its picture.

    python benchmarks/trees.py --machine "two x86-64 cores"      # about twenty minutes

Each arm and seed is `localrl train` on the demonstration, evaluated every few steps on the same
held-out prompts. Trees have kappa 4, flat groups 0 unless the arm says otherwise. A token that
several completions share was generated once and counts once.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import click
import numpy as np

from localrl.runs.logs import read_jsonl

HERE = Path(__file__).parent
ARMS = {
    "flat": ("rollout.strategy=flat", 85),
    "flat, kappa 4": ("learning.kappa=4.0", 85),
    "tree, entropy": ("rollout.fork_rule=entropy", 110),
    "tree, periodic": ("rollout.fork_rule=periodic", 110),
}
"""What an arm sets, and steps enough for MARKS[-1] tokens."""
THEN = ("rollout.group_size=8", "learning.lr=3e-4", "learning.warmup_steps=5")
"""The demonstration's settings when this was measured."""
MARKS = (100_000, 200_000, 300_000, 380_000)

Curve = tuple[np.ndarray, np.ndarray]
"""Generated tokens and pass@1, at each evaluation."""


def run(arm: str, seed: int, out: Path) -> Curve:
    """Train one arm with one seed and read its curve."""
    setting, steps = ARMS[arm]
    folder = place(out, arm, seed)
    if folder.exists():
        return read_curve(folder)
    command = [sys.executable, "-m", "localrl", "train", "--seed", str(seed), "--out", str(folder)]
    command += [part for each in THEN for part in ("--set", each)]
    command += ["--rollouts", arm.split(",")[0], "--set", setting, "--steps", str(steps)]
    command += ["--eval-every", "5", "--set", "memory.threads=1"]
    subprocess.run(command, check=True, capture_output=True)
    return read_curve(folder)


def place(out: Path, arm: str, seed: int) -> Path:
    """The run folder of an arm and a seed; a run that is there is not made again."""
    return out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def read_curve(folder: Path) -> Curve:
    """Tokens and pass@1 of a finished run."""
    tokens, evaluations = {0: 0}, {}
    for line in read_jsonl(folder / "metrics.jsonl"):
        if "num_tokens" in line:
            tokens[line["step"]] = line["num_tokens"]
        else:
            evaluations[line["step"]] = line["eval/pass@1"]
    steps = sorted(evaluations)
    return np.array([tokens[s] for s in steps]), np.array([evaluations[s] for s in steps])


def table(curves: dict[str, list[Curve]]) -> str:
    """pass@1 at the marks, interpolated between evaluations: mean and range over the seeds."""
    head = " | ".join(f"{mark // 1000}k tokens" for mark in MARKS)
    lines = [f"| arm | {head} | tokens to 0.9, thousands |", "|---" * (len(MARKS) + 2) + "|"]
    for arm, seeds in curves.items():
        cells = []
        for mark in MARKS:
            at = [float(np.interp(mark, *curve)) for curve in seeds]
            cells.append(f"{np.mean(at):.3f} ({min(at):.3f} to {max(at):.3f})")
        reached = [reach(curve, 0.9) for curve in seeds]
        cells.append(", ".join("never" if r is None else f"{r / 1000:.0f}" for r in reached))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reach(curve: Curve, goal: float) -> float | None:
    """Generated tokens at which pass@1 first reaches the goal, interpolated; None if never."""
    tokens, accuracy = curve
    above = np.flatnonzero(accuracy >= goal)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(tokens[0])
    share = (goal - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """pass@1 over generated tokens, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), constrained_layout=True)
    for color, (arm, seeds) in zip(("C7", "C2", "C0", "C1"), curves.items(), strict=True):
        for n, (tokens, accuracy) in enumerate(seeds):
            label = arm if n == 0 else None
            axes.plot(tokens / 1000, accuracy, color=color, label=label, alpha=0.8)
    axes.set(xlabel="generated tokens, thousands", ylabel="pass@1, held out", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


@click.command(help=__doc__)
@click.option("--seeds", default="0,1,2", help="Comma-separated.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/trees"))
@click.option("--machine", required=True, help="What it runs on, in words.")
def main(seeds: str, out: Path, machine: str) -> None:
    """Run the arms, two at a time, then write the page and the picture."""
    jobs = list(product(map(int, seeds.split(",")), ARMS))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: run(job[1], job[0], out), jobs))
    curves: dict[str, list[Curve]] = {arm: [] for arm in ARMS}
    for (_, arm), curve in zip(jobs, found, strict=True):
        curves[arm].append(curve)
    draw(curves, HERE / "trees.png")
    (HERE / "trees.md").write_text(
        "# Flat groups against trees\n\n"
        "The demonstration (embedded model, task `steps`, 16 prompts a step, at most 8\n"
        "completions each; trees: 2 roots, kappa 4) at equal generated tokens. pass@1 on 256\n"
        f"held-out prompts, mean and range over {len(seeds.split(','))} seeds. Measured on\n"
        f"{machine}. Made by `benchmarks/trees.py`.\n\n{table(curves)}\n\n"
        "![pass@1 over tokens](trees.png)\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
