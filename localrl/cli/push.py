"""`localrl push`."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localrl.errors import ConfigError

if TYPE_CHECKING:
    from localrl.export.staging import Staged


MESSAGE = "Adapter trained with localrl"


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/NAME")
@click.option("--dry-run", is_flag=True, help="List file names and sizes; send nothing.")
@click.option("--public", is_flag=True, help="Use a public repository; default: private.")
@click.option("--yes", is_flag=True, help="Do not ask; required by --public without a terminal.")
@click.option("--base-id", metavar="USER/NAME", help="The base model on the Hub, unquantised.")
@click.option("--task-name", metavar="TEXT", help="Task name shown in the card.")
@click.option("--with-samples", is_flag=True, help="Include some rollouts in the card.")
def push(run: Path, repo: str, dry_run: bool, public: bool, yes: bool, **telling: Any) -> None:
    """Upload a run's adapter and model card to the Hub: private, and without your data.

    \b
      localrl push runs/steps-1 you/steps --dry-run
      localrl push runs/steps-1 you/steps
    """
    from localrl.export.hub import check_repo_id, connect, explained
    from localrl.export.push import push as send
    from localrl.export.staging import stage

    def tell(line: str) -> None:
        click.echo(line, err=True)

    check_repo_id(repo)
    if public and not yes and not dry_run:
        _ask_public(repo)
    with tempfile.TemporaryDirectory(prefix="localrl-push-") as name:
        folder = Path(name)
        click.echo(_listing(stage(run, folder, repo, tell=tell if dry_run else None, **telling)))
        if dry_run:
            return
        with explained(f"The run is unchanged; push it later with: {this_command()}"):
            pushed = send(connect(), folder, repo, public=public, message=MESSAGE)
    kind = "private" if pushed.private else "public"
    done = "pushed to" if pushed.changed else "nothing changed in"
    click.echo(f"{done} {pushed.url} ({kind})")


def _ask_public(repo: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"--public makes {repo} readable by everyone, and there is no terminal to ask on. "
            "Add --yes to confirm."
        )
    click.confirm(f"{repo} will be readable by everyone. Push?", abort=True, err=True)


def _listing(staged: Iterable[Staged]) -> str:
    lines = [f"{file.bytes:>12,}  {file.name}" for file in staged]
    total = sum(file.bytes for file in staged)
    return "\n".join([*lines, f"{total:>12,}  bytes in total"])


def this_command() -> str:
    """Return the current command line, quoted for a shell."""
    return shlex.join(["localrl", *sys.argv[1:]])
