"""`localrl show`."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

import click

from localrl.errors import ConfigError
from localrl.utils.hosts import LOOPBACK


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option("--samples", is_flag=True, help="Page through groups, rewards and drop reasons.")
@click.option("--report", is_flag=True, help="Write one HTML file that opens offline.")
@click.option(
    "--live", is_flag=True, help="Serve the report on this machine while the run goes on."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that --report writes; default: report.html in the run folder.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="Port of --live; default: a free one.")
@click.option("--host", help=f"Address that --live listens on; default: {LOOPBACK}.")
def show(
    run: Path | None,
    other: Path | None,
    samples: bool,
    report: bool,
    live: bool,
    out: Path | None,
    port: int | None,
    host: str | None,
) -> None:
    """Show a run, or compare two; also works while they are running.

    Without RUN it shows the one under runs/ that was written to last.

    \b
      localrl show                           status, evaluation, curves
      localrl show runs/steps-1 --live       a page that follows the run, on this machine
      localrl show runs/steps-1 --samples    sampled completions, newest group first
      localrl show runs/steps-1 --report     an HTML file with everything
      localrl show runs/steps-1 runs/try     results side by side, and differing settings
    """
    from localrl.report.reading import newest_run, read_run

    if (
        sum(map(bool, (other, samples, report, live))) > 1
        or (out and not report)
        or ((port is not None or host) and not live)
    ):
        raise ConfigError(
            "Choose one: two runs, --samples, --report (optionally with --out), or --live "
            "(optionally with --port and --host)."
        )
    if run is None:
        run = newest_run(Path("runs"))
    if live:
        from localrl.report.live import serve

        serve(run, host or LOOPBACK, port or 0, click.echo)
    elif samples:
        from localrl.report.terminal import samples as pages

        click.echo_via_pager(pages(read_run(run)))
    elif report:
        from localrl.report.page import write_report

        written = write_report(read_run(run), out or run / "report.html")
        click.echo(f"{written.path}: {written.size / 1e6:.1f} MB, {written.words}")
    elif other:
        from localrl.report.compare import comparison

        _echo(comparison(read_run(run), read_run(other), _width()))
    else:
        from localrl.report.terminal import overview

        opened = read_run(run)
        _echo([*overview(opened, _width()), "", *next_commands(run, opened.state == "running")])


def next_commands(run: Path, running: bool) -> list[str]:
    """Return the commands with which to look at a run further."""
    name = shlex.quote(str(run))
    lines = [
        f"localrl show {name} --live      a page that follows the run",
        f"localrl show {name} --samples   sampled completions",
        f"localrl show {name} --report    an HTML file with curves and samples",
        f"localrl chat {name}             ask the trained model",
    ]
    chosen = lines[:3] if running else lines[1:]
    return [f"{'next: ' if i == 0 else '      '}{line}" for i, line in enumerate(chosen)]


def _width() -> int:
    return shutil.get_terminal_size().columns


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)
