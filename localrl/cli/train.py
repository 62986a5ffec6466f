"""`localrl train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import click

from localrl.errors import ConfigError

FLAGS = {
    "model": "model.path",
    "quantize": "model.quantize",
    "adapter": "lora.adapter",
    "task": "task.name",
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
    "memory_limit": "memory.limit",
}
"""Flags that are settings under another name."""
GIVEN = "localrl.train.arguments"


class Train(click.Command):
    """Remembers its arguments as they were given, for the process that will run them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=Train)
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option(
    "--model", metavar="MODEL", help="A folder, a .gguf, or user/name; default: embedded."
)
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@click.option("--adapter", metavar="DIR", help="Start from the adapter in this folder.")
@click.option("--task", metavar="TASK", help="A built-in task, or your file.jsonl or folder.")
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="REWARD",
    help="Your reward, file.py:name, or a built-in one; may be given several times.",
)
@click.option("--environment", metavar="ENV", help="What completions talk to, file.py:Name.")
@click.option(
    "--tool", "tools", multiple=True, metavar="TOOL", help="What they may call, file.py:name."
)
@click.option("--steps", type=int, help="Training steps.")
@click.option("--minutes", type=float, help="Stop training after this many minutes.")
@click.option("--seed", type=int, help="Every random draw derives from it.")
@click.option("--eval-every", type=int, help="Evaluate every N steps too.")
@click.option("--out", metavar="DIR", help="Run folder; without it a new one below runs/.")
@click.option("--memory-limit", metavar="SIZE", help="The most MLX may hold: 6GB, or 70%.")
@click.option("--rollouts", metavar="STRATEGY", help="flat, tree, adaptive or adaptive-tree.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting.")
@click.option("--overwrite", is_flag=True, help="Rename an existing run folder out of the way.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or the newest.")
@click.option(
    "--unsafe-code", is_flag=True, default=None, help="Run code in answers without a sandbox."
)
@click.option(
    "--no-supervise", is_flag=True, help="No parent process that restarts the run when it dies."
)
@click.option(
    "--on-battery",
    type=click.Choice(["run", "pause"]),
    help="Below 30 % of the battery: go on, or save and wait (default).",
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
    """Teach a model a task: sample, reward, update, again.

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
            return RunConfig.of_run(_stopped_run(config, overwrite, given), given)
        return RunConfig.create(given, file=config)

    if print_config:
        click.echo(resolve().to_toml())
        return
    place = find_place()
    if place is not None:
        if on_battery:
            raise ConfigError("--on-battery is for a run on one machine. Leave it out.")
        from localrl.cli.ranks import run_with_others

        run_with_others(place, resolve, overwrite=overwrite, resume=resume)
        return
    resolved = resolve()
    from localrl.processes.child import find_supervisor

    supervisor = find_supervisor()
    if supervisor is None and not no_supervise:
        _supervise(pause=on_battery != "run")
    if supervisor is None and on_battery:
        raise ConfigError("--on-battery is for the parent process. Leave --no-supervise out.")
    from localrl.cli.supervised import run_here

    run_here(resolved, supervisor, overwrite=overwrite, resume=resume)


def _supervise(*, pause: bool) -> NoReturn:
    """Let a child process do it, and end as it ends."""
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
    """The settings file of the run to go on with; its folder is put among the given settings.

    Raises: ConfigError when it cannot be told, or when more is asked than to go on.
    """
    if config or overwrite:
        what = "--overwrite" if overwrite else config
        raise ConfigError(f"--resume takes the settings of the run itself. Leave {what} out.")
    out = given.get("run.out") or _newest(Path("runs"))
    given["run.out"] = str(out)
    file = Path(out) / "config.toml"
    if not file.is_file():
        raise ConfigError(
            f"There is no run in {out} to go on with. Name its folder with --out, or leave "
            "--resume out to start a new one."
        )
    return file


def _newest(folder: Path) -> Path:
    """The run below a folder that was last written to."""
    files = list(folder.glob("*/metrics.jsonl"))
    if not files:
        raise ConfigError(f"There is no run below {folder} to go on with. Name one with --out.")
    return max(files, key=lambda path: path.stat().st_mtime).parent
