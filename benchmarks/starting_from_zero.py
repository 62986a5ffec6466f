"""A task that the model never solves: worked examples first, then reinforcement learning.

    localrl pull smollm2-135m
    python benchmarks/starting_from_zero.py --machine "two x86-64 cores"

For each seed: `localrl sft` on 200 worked examples of the task's own training problems, then
`localrl train --adapter` on that run. pass@1 is measured on the same held-out problems, which are
in neither. Each result is a line in benchmarks/starting_from_zero.jsonl; what is there already is
not measured again. It ends by printing the table of docs/starting-from-zero.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from localrl.records import Example
from localrl.runs.logs import read_jsonl
from localrl.tasks.builtin import load_task
from localrl.utils.intervals import wilson

MODEL, TASK = "smollm2-135m", "reversal:1"
EXAMPLES, HELD_OUT, SEEDS = 200, 192, (0, 1, 2)
"""With 192 problems, none of them solved, 2 % is outside the 95 % interval."""
COMMON = {
    "task.eval_prompts": HELD_OUT,
    "rollout.prompts_per_step": 8,
    "rollout.max_completion_tokens": 64,
}
SFT = {"run.steps": 30, "learning.lr": 1e-3}
TRAIN = {"rollout.group_size": 4, "run.steps": 48, "learning.lr": 3e-4}
RESULTS = Path(__file__).with_suffix(".jsonl")


@click.command(help=__doc__)
@click.option("--machine", required=True, help="What it runs on, in words.")
@click.option("--threads", default=0, help="CPU threads; default: as localrl chooses.")
def main(machine: str, threads: int) -> None:
    """Measure what is missing, then print the table."""
    COMMON["memory.threads"] = threads
    known = {row["seed"] for row in results()}
    for seed in SEEDS:
        if seed not in known:
            found = {"machine": machine, **measure(seed)}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
    print(table(results()))


def results() -> list[dict[str, Any]]:
    """The lines measured so far."""
    return list(read_jsonl(RESULTS)) if RESULTS.exists() else []


def measure(seed: int) -> dict[str, Any]:
    """Both runs of a seed."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        data = folder / "worked.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in worked_examples()))
        first, second = folder / "sft", folder / "train"
        common = ("--model", MODEL, "--task", TASK, "--seed", str(seed))
        sft_s = localrl("sft", str(data), *common, "--out", str(first), settings=COMMON | SFT)
        train_s = localrl(
            "train", *common, "--adapter", str(first), "--out", str(second), settings=COMMON | TRAIN
        )
        supervised, trained = (
            json.loads((run / "eval.json").read_bytes()) for run in (first, second)
        )
    return {
        "seed": seed,
        "base": supervised["base"]["pass@1"],
        "after sft": supervised["adapter"]["pass@1"],
        "after train": trained["adapter"]["pass@1"],
        "loss": [supervised[side]["loss"] for side in ("base", "adapter")],
        "n": supervised["n"],
        "seconds": {"sft": round(sft_s), "train": round(train_s)},
    }


def worked_examples() -> list[dict[str, Any]]:
    """Rows for `localrl sft`: problems of the task's training set with worked answers."""
    task = load_task(TASK, train_prompts=EXAMPLES)
    return [row_of(task.train(index)) for index in range(EXAMPLES)]


def row_of(example: Example) -> dict[str, Any]:
    """A problem, and the answer letter by letter, as the prompt asks for it."""
    letters = ", ".join(reversed(example.answer))
    backwards = ", ".join(example.answer)
    worked = f"The letters are {letters}. Backwards: {backwards}.\nAnswer: {example.answer}"
    return {"messages": [*example.messages, {"role": "assistant", "content": worked}]}


def localrl(command: str, *words: str, settings: dict[str, Any]) -> float:
    """Run a command to its end; return its seconds."""
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "localrl", command, *words, *given], check=True)
    return time.perf_counter() - started


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, with 95 % intervals."""
    lines = ["| seed | base | after `sft` | after `train --adapter` | seconds |", "|---" * 5 + "|"]
    for row in rows:
        cells = []
        for name in ("base", "after sft", "after train"):
            low, high = wilson(round(row[name] * row["n"]), row["n"])
            cells.append(f"{row[name]:.3f} ({low:.3f} to {high:.3f})")
        spent = " + ".join(str(row["seconds"][part]) for part in ("sft", "train"))
        lines.append(f"| {row['seed']} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
