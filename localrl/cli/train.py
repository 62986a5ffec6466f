"""`localrl train`."""

from __future__ import annotations

from typing import Any

import click

from localrl.cli.options import columns, device, set_option, settings_of
from localrl.cli.start import Starting, start, stopped_run


@click.command(cls=Starting)
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option(
    "--model", metavar="MODEL", help="Folder, .gguf file or user/name; default: embedded."
)
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@device
@click.option("--adapter", metavar="DIR", help="Start from this adapter, or a run's.")
@click.option("--task", metavar="TASK", help="A built-in task, or your file, folder or user/name.")
@columns
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="REWARD",
    help="A reward: your file.py:name or a built-in one; repeatable.",
)
@click.option("--environment", metavar="ENV", help="Environment to interact with, file.py:Name.")
@click.option(
    "--tool",
    "tools",
    multiple=True,
    metavar="TOOL",
    help="Tool to offer, file.py:name; repeatable.",
)
@click.option("--agent", metavar="AGENT", help="Your agent, file.py:function, which is trained.")
@click.option("--steps", type=int, help="Training steps.")
@click.option("--minutes", type=float, help="Stop training after this many minutes.")
@click.option("--seed", type=int, help="Seed of all random draws.")
@click.option("--eval-every", type=int, help="Also evaluate every N steps.")
@click.option("--out", metavar="DIR", help="Run folder; default: a new one under runs/.")
@click.option("--memory-limit", metavar="SIZE", help="Maximum memory of the process: 6GB or 70%.")
@click.option("--rollouts", metavar="STRATEGY", help="flat, tree or adaptive.")
@set_option("Any other setting.")
@click.option("--overwrite", is_flag=True, help="Move an existing run folder out of the way.")
@click.option("--resume", is_flag=True, help="Resume the run in --out, or the newest.")
@click.option(
    "--unsafe-code", is_flag=True, default=None, help="Run generated code without a sandbox."
)
@click.option(
    "--no-supervise", is_flag=True, help="Do not restart the run from a parent process if it dies."
)
@click.option(
    "--on-battery",
    type=click.Choice(["run", "pause"]),
    help="Below 30 % battery: keep running, or save and wait (default: pause).",
)
@click.option("--print-config", is_flag=True, help="Print the resolved settings and stop.")
def train(
    config: str | None,
    settings: tuple[str, ...],
    overwrite: bool,
    resume: bool,
    no_supervise: bool,
    on_battery: str | None,
    print_config: bool,
    **flags: Any,
) -> None:
    """Train a model on a task: sample, reward, update, repeat.

    \b
      localrl train
      localrl train --steps 20 --seed 1 --out runs/try
      localrl train --task data.jsonl --reward my_rewards.py:score
      localrl train my.toml --set rollout.group_size=16
    """
    from localrl.config import RunConfig, parse_setting

    given = dict(parse_setting(text) for text in settings)
    given |= settings_of(flags)

    def resolve() -> RunConfig:
        if resume:
            return RunConfig.of_run(stopped_run(config, overwrite, given), given, to_train=True)
        return RunConfig.create(given, file=config)

    start(
        resolve,
        overwrite=overwrite,
        resume=resume,
        no_supervise=no_supervise,
        on_battery=on_battery,
        print_config=print_config,
    )
