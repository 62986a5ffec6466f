"""`localrl show`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from localrl.errors import ConfigError


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option("--samples", is_flag=True, help="Page through groups, rewards and drop reasons.")
@click.option("--report", is_flag=True, help="Write one HTML file that opens offline.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that --report writes; default: report.html in the run folder.",
)
def show(run: Path, other: Path | None, samples: bool, report: bool, out: Path | None) -> None:
    """Show a run, or compare two; also works while they are running.

    \b
      localrl show runs/steps-1              status, evaluation, curves
      localrl show runs/steps-1 --samples    sampled completions, newest group first
      localrl show runs/steps-1 --report     an HTML file with everything
      localrl show runs/steps-1 runs/try     results side by side, and differing settings
    """
    from localrl.report.reading import read_run

    if (other and (samples or report)) or (samples and report) or (out and not report):
        raise ConfigError("Choose one: two runs, --samples, or --report (optionally with --out).")
    width = shutil.get_terminal_size().columns
    opened = read_run(run)
    if samples:
        from localrl.report.terminal import samples as pages

        click.echo_via_pager(pages(opened))
    elif report:
        from localrl.report.page import write_report

        written = write_report(opened, out or run / "report.html")
        click.echo(f"{written.path}: {written.size / 1e6:.1f} MB, {written.words}")
    elif other:
        from localrl.report.compare import comparison

        for line in comparison(opened, read_run(other), width):
            click.echo(line)
    else:
        from localrl.report.terminal import overview

        for line in overview(opened, width):
            click.echo(line)
        click.echo(f"\nnext: localrl show {run} --samples   sampled completions")
        click.echo(f"      localrl show {run} --report    an HTML file with curves and samples")
