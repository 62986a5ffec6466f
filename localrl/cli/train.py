"""`localrl train`."""

from __future__ import annotations

from typing import Any

import click

from localrl.errors import ConfigError

FLAGS = {
    "model": "model.path",
    "task": "task.name",
    "rewards": "task.rewards",
    "steps": "run.steps",
    "minutes": "run.minutes",
    "seed": "run.seed",
    "eval_every": "run.eval_every",
    "out": "run.out",
    "rollouts": "rollout.strategy",
    "unsafe_code": "task.unsafe_code",
}
"""Flags that are settings under another name."""


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option("--model", metavar="DIR", help="Folder of the model; without it the embedded one.")
@click.option("--task", metavar="TASK", help="A built-in task, or your file.jsonl or folder.")
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="REWARD",
    help="Your reward, file.py:name, or a built-in one; may be given several times.",
)
@click.option("--steps", type=int, help="Training steps.")
@click.option("--minutes", type=float, help="Stop training after this many minutes.")
@click.option("--seed", type=int, help="Every random draw derives from it.")
@click.option("--eval-every", type=int, help="Evaluate every N steps too.")
@click.option("--out", metavar="DIR", help="Run folder; without it a new one below runs/.")
@click.option("--rollouts", metavar="STRATEGY", help="flat, tree, adaptive or adaptive-tree.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting.")
@click.option("--overwrite", is_flag=True, help="Rename an existing run folder out of the way.")
@click.option("--resume", is_flag=True, help="Go on with a stopped run (not built yet).")
@click.option(
    "--unsafe-code", is_flag=True, default=None, help="Run code in answers without a sandbox."
)
@click.option("--print-config", is_flag=True, help="Print the resolved settings and stop.")
def train(
    config: str | None,
    settings: tuple[str, ...],
    overwrite: bool,
    resume: bool,
    print_config: bool,
    **flags: Any,
) -> None:
    """Teach a model a task: sample, reward, update, again.

    \b
      localrl train
      localrl train --steps 20 --seed 1 --out runs/try
      localrl train --task data.jsonl --reward my_rewards.py:score
      localrl train my.toml --set rollout.group_size=16
    """
    from localrl.config import RunConfig, parse_setting

    if resume:
        raise ConfigError("--resume is not built yet. Start a new run with another --out.")
    given = dict(parse_setting(text) for text in settings)
    given |= {FLAGS[name]: value for name, value in flags.items() if value not in (None, ())}
    resolved = RunConfig.create(given, file=config)
    if print_config:
        click.echo(resolved.to_toml())
        return
    from localrl.cli.console import Console
    from localrl.train import train as run_training

    console = Console()
    result = run_training(resolved, overwrite=overwrite, progress=console)
    console.finish(result)
