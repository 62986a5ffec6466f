"""Ask mlx-lm's own command, base against adapter, on held-out prompts.

    python benchmarks/mlx_lm_generate.py runs/steps-1

Shows that what localrl writes is what mlx-lm reads: `mlx_lm.generate --temp 1 --seed i` answers the
first 20 held-out prompts, with and without the run's adapter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from localrl.embedded import embedded_model_path
from localrl.rewards.answers import stated_answer
from localrl.tasks.builtin import load_task


def generate(prompt: str, seed: int, adapter: Path | None) -> str:
    """What `mlx_lm.generate` prints for the prompt."""
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(embedded_model_path())]
    command += ["--prompt", prompt, "--temp", "1", "--seed", str(seed), "--verbose", "False"]
    command += ["--adapter-path", str(adapter)] if adapter else []
    # Compiling through g++ would cost half a minute on a CPU.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def count_right(prompts: int, adapter: Path | None) -> int:
    """How many of the first held-out prompts get the right answer."""
    right = 0
    for seed, example in enumerate(load_task("steps", train_prompts=0).evaluation(prompts)):
        text = generate(example.messages[-1]["content"], seed, adapter)
        correct = stated_answer(text) == example.answer
        right += correct
        click.echo(f"{'right' if correct else 'wrong'}  {example.messages[-1]['content']}  {text}")
    return right


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-n", "prompts", default=20, show_default=True)
def main(run: Path, prompts: int) -> None:
    """Count right answers of the base and of the base with the run's adapter."""
    base = count_right(prompts, None)
    adapter = count_right(prompts, run / "adapter")
    click.echo(f"base {base} of {prompts}, base + adapter {adapter} of {prompts}")


if __name__ == "__main__":
    main()
