"""Options that several commands share."""

from __future__ import annotations

import click

device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    help="cpu: compute on the CPU, also on a machine with a GPU.",
)
