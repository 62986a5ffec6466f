"""`localrl bench --recipe`: a published comparison, one run after another."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from localrl.diagnostics.recipe_runs import ArmRun, Changes, plan, record, table, write_settings
from localrl.diagnostics.recipes import RECIPES
from localrl.errors import Stopped
from localrl.processes.supervisor import command_of, supervise, this_python
from localrl.tasks.loading import is_data
from localrl.tasks.sources import find_source

RESULTS = "recipe.json"
STOPPED = (Stopped.exit_code, 130)
"""Exit codes of a run that was asked to stop."""


def run_recipe(name: str, changes: Changes) -> None:
    """Make the runs that are not done, then print the table and write it to the folder.

    Exits with a run's own code if it fails.

    Raises: ConfigError, before anything is computed, if the data are missing or the settings cannot
    be; Stopped if a run was asked to stop.
    """
    recipe = RECIPES[name]
    runs = plan(recipe, changes)
    data = str(runs[0].settings["task.name"])
    if is_data(data) and Path(data).suffix != ".py":
        find_source(data)
    click.echo(f"{name}: {len(runs)} runs. localrl's authors have not run this on a Mac.")
    for number, run in enumerate(runs, start=1):
        about = "done" if run.done else f"up to {run.completions:,} completions"
        click.echo(f"\nrun {number} of {len(runs)}: {run.name}, {about}, {run.folder}")
        if not run.done:
            _train(run)
    click.echo("")
    for line in table(recipe, runs):
        click.echo(line)
    _write(changes.out / RESULTS, name, runs)


def _train(run: ArmRun) -> None:
    """Begin or continue a run as `localrl train` does, in a process of its own.

    Raises: Stopped if it was asked to stop.
    """
    python = this_python()

    def resume(folder: str) -> list[str]:
        return command_of(python, ["--resume", "--out", folder], debug=False)

    if run.begun:
        first = resume(str(run.folder))
    else:
        write_settings(run)
        first = command_of(python, [str(run.file)], debug=False)
    code = supervise(first, resume)
    if code in STOPPED:
        raise Stopped(
            "The comparison was stopped. Give the same command again: runs that are done are not "
            "made again, and this one goes on from its last checkpoint."
        )
    if code:
        sys.exit(code)


def _write(path: Path, name: str, runs: list[ArmRun]) -> None:
    from localrl.runs.folder import package_versions
    from localrl.runs.logs import to_json, write_atomic

    versions = package_versions(("localrl", "mlx", "mlx-lm"))
    found = record(name, RECIPES[name], runs, versions)
    write_atomic(path, to_json(found, indent=2) + b"\n")
    click.echo(f"The same in numbers: {path}")
