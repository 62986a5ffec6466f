"""Decoding of SmolLM2-135M beside llama.cpp, the same GGUF file: tokens per second at some rows.

    python benchmarks/beside_llama_cpp.py --home DIR [--rounds 5]

DIR has node-llama-cpp in its node_modules, as .ci/interop installs it (.venv-interop-node). Both
have two threads, prompts of 45 tokens and completions of 48; they take turns, each in a process of
its own. Medians go to benchmarks/beside_llama_cpp.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import click

from localrl.utils.packaged import PACKAGED_MODELS, packaged_file

HERE = Path(__file__).resolve()
MODEL, ROWS, PROMPT, TOKENS = "smollm2-135m", (1, 8, 16, 32), 45, 48
LIMIT_S = 600


def of_llama_cpp(file: Path, home: str, rows: int) -> float:
    """Tokens a second."""
    script = HERE.parent / "peers" / "llama_cpp_rate.mjs"
    command = ["node", str(script), str(file), str(rows), str(PROMPT), str(TOKENS)]
    env = {**os.environ, "LLAMA_CPP_HOME": home, "THREADS": "2"}
    done = subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, timeout=LIMIT_S
    )
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_s"]


def of_localrl(rows: int) -> float:
    """Tokens a second."""
    given = {"--model": MODEL, "--rows": rows, "--prompt-tokens": PROMPT, "--tokens": TOKENS}
    flags = [str(text) for pair in given.items() for text in pair]
    command = [sys.executable, "-m", "localrl", "bench", *flags, "--repeats", "1", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S)
    return json.loads(done.stdout)["decode"][0]["tokens_per_s"]


@click.command(help=__doc__)
@click.option("--home", required=True, help="Folder that has node-llama-cpp.")
@click.option("--rounds", default=5, show_default=True)
def main(home: str, rounds: int) -> None:
    """Measure, write and print."""
    file = packaged_file(PACKAGED_MODELS[MODEL])
    rates: dict[str, dict[int, list[float]]] = {
        tool: {rows: [] for rows in ROWS} for tool in ("localrl", "llama.cpp")
    }
    loads = []
    for _ in range(rounds):
        for rows in ROWS:
            loads.append(os.getloadavg()[0])
            rates["localrl"][rows].append(round(of_localrl(rows), 1))
            rates["llama.cpp"][rows].append(round(of_llama_cpp(file, home, rows), 1))
            click.echo(f"{rows} rows: " + ", ".join(f"{k} {v[rows][-1]}" for k, v in rates.items()))
    found = {tool: {n: median(of_rows) for n, of_rows in r.items()} for tool, r in rates.items()}
    ratios = {n: round(found["localrl"][n] / found["llama.cpp"][n], 2) for n in ROWS}
    report = {"tokens_per_s": rates, "medians": found, "localrl / llama.cpp": ratios, "load": loads}
    HERE.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps({"medians": found, "localrl / llama.cpp": ratios}, indent=1))


if __name__ == "__main__":
    main()
