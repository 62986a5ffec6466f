"""SmolLM2-135M: what it can do, which settings suit it, and the runs of examples/smollm2.

    localrl pull smollm2-135m
    python benchmarks/smollm2.py all --machine "two x86-64 cores"     # a few hours
    python benchmarks/smollm2.py runs --machine "two x86-64 cores"    # the three seeds alone
    python benchmarks/smollm2.py page                                 # from the results: seconds

`tasks` measures pass@1 on the built-in tasks, `settings` tries training settings in short runs, and
`runs` trains the example's two tasks with three seeds. Each result is a line in
benchmarks/smollm2/; what is there already is not measured again. `page` writes docs/smollm2.md's
tables and its picture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from smollm2_page import EXAMPLE, read, results, write_page

from localrl.errors import LocalRLError
from localrl.runs.logs import JsonLines, read_jsonl

MODEL = "smollm2-135m"
TASKS = (
    *("extraction:1", "extraction:2", "extraction:3", "choice:1", "arithmetic:1", "units:1"),
    *("dates:1", "reversal:1", "countdown:1", "bases:1", "functions:1", "guessing:1"),
    "calculator:1",
)
TEMPERATURES = (0.0, 0.7, 1.0)
PROMPTS, TOKENS, TURNS = 64, 96, 4
"""Of the measurement of tasks."""
FILES = ("train.toml", "sums.toml")
SEEDS = (0, 1, 2)
COMMON = {
    "rollout.temperature": 0.7,
    "rollout.group_size": 4,
    "learning.lr": 3e-4,
    "learning.warmup_steps": 2,
    "task.eval_temperature": 0,
    "task.eval_prompts": 96,
    "run.steps": 20,
    "run.eval_every": 0,
}
"""Settings of short trials, from which each trial differs in one thing."""
COMPLETIONS = {"train.toml": 32, "sums.toml": 64}
"""In a step of a trial."""
TRIALS: dict[str, dict[str, Any]] = {
    "lr 3e-4, temperature 0.7, groups of 4": {},
    "lr 5e-5": {"learning.lr": 5e-5},
    "lr 1e-4": {"learning.lr": 1e-4},
    "lr 1e-3": {"learning.lr": 1e-3},
    "temperature 1": {"rollout.temperature": 1.0},
    "groups of 2": {"rollout.group_size": 2},
    "groups of 8": {"rollout.group_size": 8},
}

Result = dict[str, Any]


@click.group(help=__doc__)
def main() -> None:
    """The commands stand below."""


@main.command("all")
@click.option("--machine", required=True, help="What it runs on, in words.")
def everything(machine: str) -> None:
    """Measure what is missing, then write the page."""
    measure_tasks()
    try_settings()
    train_seeds(machine)
    write_page()


@main.command("tasks")
def tasks_alone() -> None:
    """What the model can do before training."""
    measure_tasks()


@main.command("settings")
def settings_alone() -> None:
    """Short runs."""
    try_settings()


@main.command("runs")
@click.option("--machine", required=True, help="What it runs on, in words.")
def runs_alone(machine: str) -> None:
    """The example, three seeds."""
    train_seeds(machine)


@main.command("page")
def page_alone() -> None:
    """The tables and the picture."""
    write_page()


def measure_tasks() -> None:
    """pass@1 of the model as it is, by task and temperature."""
    for task in TASKS:
        for temperature in TEMPERATURES:
            key = {"task": task, "temperature": temperature}
            once("tasks", key, lambda key=key: measure_task(**key))


def measure_task(task: str, temperature: float) -> Result:
    """What `localrl eval` says of a task, or why the model cannot be asked it."""
    words = ["--model", MODEL, "--task", task, "--temperature", str(temperature)]
    words += ["--prompts", str(PROMPTS), "--set", f"rollout.max_completion_tokens={TOKENS}"]
    try:
        return evaluation(*words, "--set", f"rollout.max_turns={TURNS}")
    except LocalRLError as error:
        return {"problem": str(error)}


def try_settings() -> None:
    """Short runs of the example's tasks, each with one setting changed; all evaluated greedily."""
    for file in FILES:
        for name, changes in TRIALS.items():
            key = {"file": file, "trial": name}
            once("settings", key, lambda file=file, changes=changes: trial(file, COMMON | changes))


def trial(file: str, settings: Result) -> Result:
    """A short run and what it reached."""
    prompts = COMPLETIONS[file] // settings["rollout.group_size"]
    settings = settings | {"rollout.prompts_per_step": prompts}
    words = [f"{key}={value}" for key, value in settings.items()]
    with TemporaryDirectory() as place:
        run = Path(place) / "run"
        train(file, run, *(part for word in words for part in ("--set", word)))
        return read_run(run)


def train_seeds(machine: str) -> None:
    """The example as its README runs it."""
    for file in FILES:
        for seed in SEEDS:
            key = {"file": file, "seed": seed}
            once("runs", key, lambda key=key: train_seed(**key) | {"machine": machine})


def train_seed(file: str, seed: int) -> Result:
    """One seed's run, and both sides measured greedily as well."""
    with TemporaryDirectory() as place:
        run = Path(place) / "run"
        load, started = os.getloadavg()[0], time.monotonic()
        said = train(file, run, "--seed", str(seed))
        whole_s = time.monotonic() - started
        greedy = evaluation(str(run), "--temperature", "0")
        samples = said.partition("prompt ")[1:]
        return read_run(run) | {
            "whole_s": whole_s,
            "load_before": load,
            "greedy": greedy,
            "samples": "".join(samples).rpartition(" steps in ")[0].rpartition("\n")[0].strip(),
        }


def read_run(run: Path) -> Result:
    """What a finished run left behind."""
    lines = list(read_jsonl(run / "metrics.jsonl"))
    steps = [line for line in lines if "reward" in line]
    return {
        "eval": json.loads((run / "eval.json").read_text()),
        "evaluations": [
            {"step": line["step"], "pass@1": line["eval/pass@1"]}
            for line in lines
            if "eval/pass@1" in line
        ],
        "reward": [line["reward"] for line in steps],
        "tokens": [line["completions/mean_length"] for line in steps],
        "step_s": [line["step_time"] for line in steps],
        "resident_bytes": max(line["memory/resident_bytes"] or 0 for line in steps),
    }


def once(name: str, key: Result, measure: Callable[[], Result]) -> None:
    """Measure and keep it, unless a result with this key is there."""
    if any(key.items() <= result.items() for result in read(name)):
        return
    click.echo(f"{name}: {key}", err=True)
    result = key | measure()
    path = results(name)
    path.parent.mkdir(exist_ok=True)
    JsonLines(path).append(result)


def train(file: str, run: Path, *words: str) -> str:
    """Train the example in its folder; what was printed."""
    return localrl("train", file, "--out", str(run), *words)


def evaluation(*words: str) -> Result:
    """What `localrl eval` measured, without the places where things lay."""
    found = json.loads(localrl("eval", *words, "--json"))
    return {name: value for name, value in found.items() if name not in ("model", "adapter")}


def localrl(*words: str) -> str:
    """Run a command in the example's folder.

    Raises: LocalRLError with what it said when it fails.
    """
    command = [sys.executable, "-m", "localrl", *words]
    done = subprocess.run(command, cwd=EXAMPLE, stdout=-1, stderr=-1, text=True)
    if done.returncode:
        raise LocalRLError(done.stderr.strip().splitlines()[-1])
    return done.stdout


if __name__ == "__main__":
    main()
