"""SmolLM2-135M beside TRL on torch's CPU: seconds of a step, and the memory of the process.

    python benchmarks/beside_trl.py --python ENVIRONMENT/bin/python [--rounds 5]

The environment has TRL, PEFT and torch, as .ci/interop makes it. Both train adapters of rank 16 on
the same weights: localrl loads the model's 4 bits, TRL a copy in float32 that is made here. A step
is 8 prompts of 4 completions of 24 tokens, under a reward that differs from text to text, so that
every completion is learned from. They take turns; the first step of each process is not counted.
Results are kept in benchmarks/beside_trl.jsonl as they come.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import click
from side_by_side import PEERS, watch

from localrl.policy.loading import find_model
from localrl.runs.logs import read_jsonl

RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
MODEL, PROMPTS, GROUP, TOKENS, RANK = "smollm2-135m", 8, 4, 24, 16
LIMIT_S = 900.0


def make_data(path: Path) -> None:
    """Sums of two-digit numbers, asked in words."""
    rows = [(a, b) for a in range(11, 43, 4) for b in range(12, 40, 7)]
    lines = [
        json.dumps({"prompt": f"What is {a} + {b}? Reply with the number only.", "answer": a + b})
        for a, b in rows
    ]
    path.write_text("\n".join(lines) + "\n")


def make_dense(folder: Path) -> Path:
    """The same weights in float32, as transformers reads them."""
    from mlx_lm import convert

    out = folder / "dense"
    convert(str(find_model(MODEL)), str(out), dequantize=True, dtype="float32")
    return out


def run(tool: str, python: str, model: Path, work: Path, steps: int) -> dict:
    """One process: seconds of its later steps, and its peak."""
    out = work / "out.json"
    out.unlink(missing_ok=True)
    given = {
        "model": model, "data": work / "data.jsonl", "out": out, "steps": steps, "group": GROUP,
        "prompts": PROMPTS, "tokens": TOKENS, "max-length": 64 + TOKENS, "rank": RANK,
        "reward": "varied",
    }  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    load = os.getloadavg()[0]
    peak, problem = watch([python, str(PEERS / f"run_{tool}.py"), *flags], LIMIT_S)
    told = json.loads(out.read_text()) if out.exists() else {}
    return {"tool": tool, "load": load, "peak_bytes": peak, "problem": problem, **told}


def summary(lines: list[dict]) -> dict:
    """Medians over processes of the median of their counted steps, and ratios."""
    found = {}
    for tool in ("localrl", "trl"):
        mine = [line for line in lines if line["tool"] == tool and not line["problem"]]
        found[tool] = {
            "processes": len(mine),
            "step_s": round(median(median(line["seconds"][1:]) for line in mine), 2),
            "peak_mb": round(median(line["peak_bytes"] for line in mine) / 1e6),
        }
    for name in ("step_s", "peak_mb"):
        found[f"trl / localrl, {name}"] = round(found["trl"][name] / found["localrl"][name], 1)
    return found


@click.command(help=__doc__)
@click.option("--python", required=True, help="Of the environment that has TRL.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=4, show_default=True, help="The first one is not counted.")
def main(python: str, rounds: int, steps: int) -> None:
    """Measure, keep and print."""
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a") as results:
        work = Path(folder)
        make_data(work / "data.jsonl")
        models = {"localrl": find_model(MODEL), "trl": make_dense(work)}
        pythons = {"localrl": sys.executable, "trl": python}
        for _ in range(rounds):
            for tool, model in models.items():
                result = run(tool, pythons[tool], model, work, steps)
                results.write(json.dumps(result) + "\n")
                results.flush()
                took = " ".join(f"{seconds:.2f}" for seconds in result.get("seconds", ()))
                peak = f"{result['peak_bytes'] / 1e6:.0f} MB, load {result['load']:.1f}"
                click.echo(f"{tool:8} {result['problem'] or took}  {peak}")
    click.echo(json.dumps(summary(list(read_jsonl(RESULTS))), indent=1))


if __name__ == "__main__":
    main()
