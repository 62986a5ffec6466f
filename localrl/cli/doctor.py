"""`localrl doctor`."""

from __future__ import annotations

import dataclasses
import json

import click

from localrl.cli.options import device

FAILED = 1
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@click.command()
@click.option("--model", metavar="MODEL", help="Also load this model: a folder or user/name.")
@click.option("--quantize", type=int, default=0, metavar="BITS", help="As for `train`.")
@device
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(model: str | None, quantize: int, device: str | None, as_json: bool) -> None:
    """Check this machine and, with --model, a model: what works, and on which path.

    Exits with 1 if a check fails. Never uses the network.

    \b
      localrl doctor
      localrl doctor --model path/to/model
    """
    from itertools import chain

    from localrl import backend
    from localrl.display.line import showing
    from localrl.utils.text import printable

    backend.compute_on_cpu(device == "cpu")
    rows = []
    with showing("checking this machine") as status:
        from localrl.diagnostics.doctor import look_at_machine, look_at_model

        for row in chain(look_at_machine(), look_at_model(model, quantize) if model else ()):
            rows.append(row)
            status.now(f"checking, {len(rows)} done")
            if not as_json:
                status.echo(f"{MARKS[row.status]}  {row.id:27}{printable(row.text)}")
                if row.todo:
                    status.echo(f"{'':33}-> {printable(row.todo)}")
    if as_json:
        click.echo(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
    if any(row.status == "fail" for row in rows):
        raise click.exceptions.Exit(FAILED)
