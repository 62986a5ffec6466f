"""Options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
FLAGS = {
    "model": "model.path",
    "quantize": "model.quantize",
    "device": "model.device",
    "adapter": "lora.adapter",
    "task": "task.name",
    "data": "task.demonstrations",
    "from_rollouts": "task.demonstrations",
    "columns": "task.columns",
    "rewards": "task.rewards",
    "environment": "task.environment",
    "tools": "task.tools",
    "agent": "task.agent",
    "prompts": "task.eval_prompts",
    "temperature": "task.eval_temperature",
    "unsafe_code": "task.unsafe_code",
    "rollouts": "rollout.strategy",
    "steps": "run.steps",
    "minutes": "run.minutes",
    "seed": "run.seed",
    "eval_every": "run.eval_every",
    "out": "run.out",
    "memory_limit": "memory.limit",
}
"""Settings that the flags of `train`, `sft`, `eval` and `plan` set, by parameter."""


def settings_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the flags that were given."""
    return {FLAGS[name]: value for name, value in flags.items() if value not in (None, ())}


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


def _tell_repeated(
    context: click.Context, option: click.Parameter, texts: tuple[str, ...]
) -> tuple[str, ...]:
    """Warn of settings that are given more than once, of which the last counts."""
    names = [text.partition("=")[0].strip() for text in texts]
    last = dict(zip(names, texts, strict=True))
    if len(last) == len(texts):
        return texts
    from localrl.processes.child import VARIABLE

    if VARIABLE not in os.environ:  # else the parent process has told it
        for name, text in last.items():
            if names.count(name) > 1:
                click.echo(
                    f"warning: --set gives {name} more than once; {text.strip()} counts", err=True
                )
    return texts


def set_option(told: str) -> Callable[[Command], Command]:
    """Return the option --set. told: its help."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_tell_repeated,
        help=told,
    )


device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    help="cpu: compute on the CPU, also on a machine with a GPU.",
)
