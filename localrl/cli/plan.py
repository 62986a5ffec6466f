"""`localrl plan`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from localrl.cli.options import settings_of
from localrl.cli.train import train
from localrl.errors import ConfigError

if TYPE_CHECKING:
    from localrl.config import RunConfig
    from localrl.training.memory_plan import Outlook

SHARED = (
    "config", "model", "quantize", "adapter", "task", "columns", "rewards", "environment", "tools",
    "agent", "rollouts", "device", "memory_limit", "settings",
)  # fmt: skip
"""Parameters shared with `localrl train`."""


@click.command(params=[param for param in train.params if param.name in SHARED])
@click.option(
    "--mac",
    type=click.IntRange(4, 1024),
    metavar="GB",
    help="Plan for a Mac with this much memory.",
)
@click.option("--models", is_flag=True, help="Rank the models that localrl knows.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    config: str | None,
    settings: tuple[str, ...],
    mac: int | None,
    models: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Check that a run fits into memory, at what sizes, and what has to be reduced.

    Takes the settings of `localrl train`. No weights are loaded: the model may also be a
    config.json, or the name of a well-known model that is not on this machine. If model and task
    are available, the task's prompts are measured. Exits with 3 if nothing fits.

    \b
      localrl plan
      localrl plan my.toml --memory-limit 6GB
      localrl plan --model mlx-community/Qwen3-0.6B-4bit --mac 8
      localrl plan --models --mac 16
    """
    from localrl import backend
    from localrl.config import RunConfig, parse_setting
    from localrl.display.line import showing
    from localrl.memory import machine
    from localrl.training.memory_plan import outlook
    from localrl.training.prompt_lengths import find

    given = dict(parse_setting(text) for text in settings)
    given |= settings_of(flags)
    if models:
        _rank(given, config, mac, as_json)
        return
    wish = RunConfig.create(given, file=config)
    backend.compute_on_cpu(wish.model.on_cpu)
    with showing("reading the task's prompts"):
        prompts = find(wish)  # before the machine is read, as in a run: what it loads stays
    here = machine.read_machine() if mac is None else machine.mac(mac)
    found = outlook(wish, here, prompts)
    duration = Duration.of(wish, found, elsewhere=mac is not None)
    if as_json:
        click.echo(json.dumps(_fields(found, duration), indent=2))
    else:
        click.echo(_page(found, duration, mac))


def _rank(given: dict[str, Any], file: str | None, mac: int | None, as_json: bool) -> None:
    """Print what the known models do on the machine, with these settings."""
    from localrl import backend
    from localrl.cli.plan_models import fields_of, page
    from localrl.config import RunConfig
    from localrl.display.line import showing
    from localrl.embedded import EMBEDDED_MODEL
    from localrl.memory import machine
    from localrl.memory.limit import memory_limit
    from localrl.training.model_choice import rank

    if "model.path" in given:
        raise ConfigError(f"--models ranks all models. Remove --model {given['model.path']}.")
    wish = RunConfig.create({**given, "model.path": EMBEDDED_MODEL}, file=file)
    backend.compute_on_cpu(wish.model.on_cpu)
    here = machine.read_machine() if mac is None else machine.mac(mac)
    with showing("planning every known model"):
        ranked = rank(given, file, here)
    limit = memory_limit(wish.memory.limit, here)
    click.echo(
        json.dumps(fields_of(ranked, limit), indent=2) if as_json else page(ranked, limit, mac)
    )


@dataclass(frozen=True)
class Duration:
    """The tokens and the time of a run."""

    tokens: str
    seconds: float | None
    """Expected from the last run of this model here; None if there was none."""
    elsewhere: bool
    """True if the plan is for another machine."""

    @classmethod
    def of(cls, config: RunConfig, found: Outlook, *, elsewhere: bool) -> Duration:
        """Return tokens and time of the planned run."""
        from localrl.display.console import amount
        from localrl.training import speeds
        from localrl.training.memory_plan import shape_of

        plan, sizes = found.plan, found.request.sizes
        tokens = amount(config, shape_of(config, plan), plan)
        if elsewhere:
            return cls(tokens, None, elsewhere)
        engine = found.request.workloads[plan.group_size].engine(sizes, dense=plan.dequantise)
        speed = speeds.recall(sizes, engine.name)
        seconds = speed and speeds.expected_s(config, plan, sizes, speed)
        return cls(tokens, seconds, elsewhere)

    def __str__(self) -> str:
        from localrl.display.console import expectation

        return "not known: measured where it runs" if self.elsewhere else expectation(self.seconds)


def _fields(found: Outlook, duration: Duration) -> dict[str, Any]:
    return {
        "plan": asdict(found.plan),
        "expected_seconds": duration.seconds,
        "wanted": asdict(found.request.plan),
        "prompts": asdict(found.request.prompts) if found.request.prompts else None,
        "bytes": {**vars(found.estimate), "peak": found.estimate.peak},
        "limit_for_everything_bytes": found.enough,
        "machine": asdict(found.machine),
        "limit": asdict(found.request.limit),
    }


def _page(found: Outlook, duration: Duration, mac: int | None) -> str:
    from localrl.memory.estimate import told
    from localrl.memory.limit import LATER, show

    plan, limit = found.plan, found.request.limit
    lines = [
        f"model    {found.model}: {found.weights / 1e6:,.0f} million weights",
        f"limit    {show(limit.bytes)} for MLX: {limit.reason}" if limit.bytes else limit.reason,
    ]
    if found.request.prompts:
        lines.append(f"task     {found.request.prompts}")
    if mac is not None:
        lines.append(f"         predicted for a Mac with {mac} GB, never run on one")
    if found.machine.resident_bytes:
        held, later = show(found.machine.resident_bytes), show(LATER)
        lines.append(f"process  holds {held} besides MLX's memory, later about {later} more")
    lines += [f"tokens   {duration.tokens}", f"time     {duration}"]
    lines += ["", f"{'':34}{'bytes at most':>14}"]
    lines += [f"{name:34}{show(size):>14}" for name, size in told(found.estimate) if size]
    basis = "measured on this machine" if plan.measured else "priors, not measured here"
    basis = "counted" if found.request.counted(plan) else basis
    lines += [f"{'peak':34}{show(found.estimate.peak):>14}   ({basis})", ""]
    lines += [f"{'':34}{'wanted':>14}{'planned':>14}"]
    for name in SIZES:
        wish, now = getattr(found.request.plan, name), getattr(plan, name)
        mark = "" if wish == now else "   reduced"
        lines.append(f"{name:34}{_value(wish):>14}{_value(now):>14}{mark}")
    return "\n".join([*lines, "", _verdict(found)])


SIZES = (
    "group_size", "max_prompt_tokens", "max_completion_tokens", "decode_rows", "prefill_rows",
    "micro_rows", "head_chunk", "grad_checkpoint", "dequantise",
)  # fmt: skip


def _value(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _verdict(found: Outlook) -> str:
    from localrl.memory.limit import show, write_limit

    if found.request.limit.bytes is None:
        return "This machine's memory could not be read; no limit is applied."
    if not found.is_reduced:
        return "It fits, and nothing is reduced."
    return (
        "It fits with reduced sizes. Nothing would be reduced with --memory-limit "
        f"{write_limit(found.enough)} ({show(found.enough)})."
    )
