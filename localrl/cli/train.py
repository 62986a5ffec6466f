"""`localrl train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import click

from localrl.cli.options import columns, device, set_option
from localrl.errors import ConfigError

FLAGS = {
    "model": "model.path",
    "quantize": "model.quantize",
    "device": "model.device",
    "adapter": "lora.adapter",
    "task": "task.name",
    "columns": "task.columns",
    "rewards": "task.rewards",
    "steps": "run.steps",
    "minutes": "run.minutes",
    "seed": "run.seed",
    "eval_every": "run.eval_every",
    "out": "run.out",
    "rollouts": "rollout.strategy",
    "unsafe_code": "task.unsafe_code",
    "environment": "task.environment",
    "tools": "task.tools",
    "agent": "task.agent",
    "memory_limit": "memory.limit",
}
"""Settings that the flags set."""
GIVEN = "localrl.train.arguments"


class Train(click.Command):
    """A command that keeps its raw arguments for the child process that will run them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=Train)
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option(
    "--model", metavar="MODEL", help="Folder, .gguf file or user/name; default: embedded."
)
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@device
@click.option("--adapter", metavar="DIR", help="Start from the adapter in this folder.")
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
    from localrl.distributed.launch import find_place

    given = dict(parse_setting(text) for text in settings)
    given |= {FLAGS[name]: value for name, value in flags.items() if value not in (None, ())}

    def resolve() -> RunConfig:
        if resume:
            return RunConfig.of_run(_stopped_run(config, overwrite, given), given, to_train=True)
        return RunConfig.create(given, file=config)

    if print_config:
        click.echo(resolve().to_toml())
        return
    place = find_place()
    if place is not None:
        if on_battery:
            raise ConfigError("--on-battery only works on one machine. Remove it.")
        from localrl.cli.ranks import run_with_others

        run_with_others(place, resolve, overwrite=overwrite, resume=resume)
        return
    resolved = resolve()
    from localrl.processes.child import find_supervisor

    supervisor = find_supervisor()
    if supervisor is None and not no_supervise:
        _supervise(pause=on_battery != "run")
    if supervisor is None and on_battery:
        raise ConfigError("--on-battery needs the parent process. Remove --no-supervise.")
    from localrl.display.line import showing

    with showing("starting"):  # importing MLX can take seconds
        from localrl.cli.supervised import run_here
    run_here(resolved, supervisor, overwrite=overwrite, resume=resume)


def _supervise(*, pause: bool) -> NoReturn:
    """Run training in a child process and exit with its status."""
    from localrl.processes.supervisor import command_of, supervise, this_python

    context, python = click.get_current_context(), this_python()
    debug = bool(context.find_root().params.get("debug"))
    context.exit(
        supervise(
            command_of(python, context.meta[GIVEN], debug=debug),
            lambda run: command_of(python, ["--resume", "--out", run], debug=debug),
            pause=pause,
        )
    )


def _stopped_run(config: str | None, overwrite: bool, given: dict[str, Any]) -> Path:
    """Return the settings file of the run to resume; add its folder to the given settings.

    Raises: ConfigError if no run is found, or if options besides resuming are given.
    """
    if config or overwrite:
        what = "--overwrite" if overwrite else config
        raise ConfigError(f"--resume uses the run's own settings. Remove {what}.")
    out = given.get("run.out") or _newest(Path("runs"))
    given["run.out"] = str(out)
    file = Path(out) / "config.toml"
    if not file.is_file():
        raise ConfigError(
            f"There is no run in {out} to resume. Pass its folder with --out, or remove "
            "--resume to start a new one."
        )
    return file


def _newest(folder: Path) -> Path:
    """Find the most recently written run under a folder."""
    files = list(folder.glob("*/metrics.jsonl"))
    if not files:
        raise ConfigError(f"There is no run under {folder} to resume. Pass one with --out.")
    return max(files, key=lambda path: path.stat().st_mtime).parent
