"""The `localrl` command: parse, call, print. Heavy imports stay inside command bodies."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import IO, Any

import click

from localrl.cli.bench import bench
from localrl.cli.chat import chat
from localrl.cli.doctor import doctor
from localrl.cli.eval import evaluate
from localrl.cli.export import export
from localrl.cli.init import init
from localrl.cli.plan import plan
from localrl.cli.pull import pull
from localrl.cli.push import push
from localrl.cli.serve import serve
from localrl.cli.sft import sft
from localrl.cli.show import show
from localrl.cli.tasks import tasks
from localrl.cli.train import train
from localrl.errors import LocalRLError, Stopped
from localrl.memory.failures import failure_of
from localrl.processes.child import DISPLAY, RELAX

FAILED, INTERRUPTED = 1, 130


class Failure(click.ClickException):
    """A localrl error in the form click shows."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.status = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message; a run that was stopped on request did not fail."""
        if self.status == Stopped.exit_code:
            click.echo(self.format_message(), file=file, err=file is None)
        else:
            super().show(file)


class CommandGroup(click.Group):
    """A command group that turns errors it can explain into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LocalRLError, RuntimeError) as error:
            if isinstance(error, LocalRLError):
                told = Failure(str(error), error.exit_code)
            elif failure_of(error) == "watchdog":
                told = Failure(f"{error} {DISPLAY}, or try again with {RELAX}=1.", FAILED)
            else:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise told from error


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="localrl")
def cli(debug: bool) -> None:
    """Teach a small language model a skill on your own machine.

    \b
      localrl train                    the embedded model, a built-in task, no network
      localrl init DIR                 a starter folder of your own
      localrl train --model DIR ...    your own model
      localrl plan --model DIR ...     check that it fits into memory
      localrl tasks show steps         see a task as the model sees it
    """


cli.add_command(init)
cli.add_command(train)
cli.add_command(sft)
cli.add_command(tasks)
cli.add_command(show)
cli.add_command(evaluate)
cli.add_command(chat)
cli.add_command(serve)
cli.add_command(export)
cli.add_command(pull)
cli.add_command(push)
cli.add_command(doctor)
cli.add_command(plan)
cli.add_command(bench)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with the codes listed in `localrl.errors`."""
    try:
        status = cli.main(args=arguments, prog_name="localrl", standalone_mode=False)
    except click.exceptions.Exit as done:
        status = done.exit_code
    except click.ClickException as error:
        error.show()
        status = error.status if isinstance(error, Failure) else error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        status = INTERRUPTED
    sys.exit(status if isinstance(status, int) else 0)
