"""Starting a run, for the commands that do: in this process, under a supervisor, or with others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from localrl.errors import ConfigError

if TYPE_CHECKING:
    from localrl.config import RunConfig

GIVEN = "localrl.start.arguments"


class Starting(click.Command):
    """A command that keeps its raw arguments for the child process that will run them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)


def start(
    resolve: Callable[[], RunConfig],
    *,
    overwrite: bool,
    resume: bool,
    no_supervise: bool,
    on_battery: str | None,
    print_config: bool,
) -> None:
    """Run the settings that `resolve` returns, or print them.

    Raises: ConfigError for options that do not go together.
    """
    from localrl.distributed.launch import find_place

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


def stopped_run(config: str | None, overwrite: bool, given: dict[str, Any]) -> Path:
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


def _supervise(*, pause: bool) -> NoReturn:
    """Run the command in a child process and exit with its status."""
    from localrl.processes.supervisor import command_of, supervise, this_python

    context, python = click.get_current_context(), this_python()
    debug, name = bool(context.find_root().params.get("debug")), context.info_name or "train"
    context.exit(
        supervise(
            command_of(python, context.meta[GIVEN], debug=debug, name=name),
            lambda run: command_of(python, ["--resume", "--out", run], debug=debug),
            pause=pause,
        )
    )


def _newest(folder: Path) -> Path:
    """Find the most recently written run under a folder."""
    files = list(folder.glob("*/metrics.jsonl"))
    if not files:
        raise ConfigError(f"There is no run under {folder} to resume. Pass one with --out.")
    return max(files, key=lambda path: path.stat().st_mtime).parent
