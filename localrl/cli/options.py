"""Options that several commands share."""

from __future__ import annotations

import re

import click


def _split(
    context: click.Context, option: click.Parameter, texts: tuple[str, ...]
) -> tuple[str, ...]:
    """Split prompt=question,answer=final at the commas that a further name follows."""
    return tuple(part for text in texts for part in re.split(r",(?=\s*\w+\s*=)", text))


columns = click.option(
    "--columns",
    multiple=True,
    callback=_split,
    metavar="NAME=COLUMN",
    help="Name columns of your data: prompt=question,answer=final.",
)

device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    help="cpu: compute on the CPU, also on a machine with a GPU.",
)
