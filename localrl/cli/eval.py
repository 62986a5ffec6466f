"""`localrl eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localrl.cli.options import columns, device, set_option, settings_of
from localrl.errors import ConfigError
from localrl.utils.figures import fixed
from localrl.utils.text import sampled_at

if TYPE_CHECKING:
    from localrl.config import RunConfig
    from localrl.diagnostics.compare import Difference, Result, Side


@click.command("eval")
@click.argument("run", required=False, metavar="[RUN]", type=click.Path(path_type=Path))
@click.option(
    "--model", metavar="MODEL", help="Folder, .gguf file or user/name; default: embedded."
)
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@click.option("--adapter", metavar="DIR", help="Compare with the adapter in this folder.")
@click.option("--task", metavar="TASK", help="A built-in task, or your file, folder or user/name.")
@columns
@click.option("--reward", "rewards", multiple=True, metavar="REWARD", help="As for `train`.")
@click.option("--environment", metavar="ENV", help="As for `train`.")
@click.option("--tool", "tools", multiple=True, metavar="TOOL", help="As for `train`.")
@click.option("--agent", metavar="AGENT", help="As for `train`.")
@set_option("Any other setting.")
@click.option("--unsafe-code", is_flag=True, default=None, help="As for `train`.")
@device
@click.option("-k", "--samples", type=click.IntRange(1), default=1, help="Completions per prompt.")
@click.option("--prompts", type=click.IntRange(1), help="Maximum number of prompts.")
@click.option(
    "--temperature",
    type=float,
    help="Sampling temperature; 0 takes the likeliest token; default: as in training.",
)
@click.option("--seed", type=click.IntRange(0), help="Sampling seed; default: as in training.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write JSON here."
)
def evaluate(
    run: Path | None,
    settings: tuple[str, ...],
    samples: int,
    seed: int | None,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Measure a model on held-out prompts, or on all rows of a file: pass@k, and the effect of an
    adapter.

    \b
      localrl eval runs/steps-1                      a run's adapter against its base
      localrl eval runs/steps-1 -k 8 --prompts 100   pass@1 to pass@8
      localrl eval --model DIR --adapter DIR --task test.jsonl --reward accuracy
    """
    from localrl.display.line import showing

    if out is not None and out.exists():
        raise ConfigError(f"{out} already exists. Choose another file with --out, or move it.")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"There is no folder {out.parent} to write {out.name} into.")
    with showing("starting") as status:
        from localrl.diagnostics.compare import evaluate_model
        from localrl.evaluate import EVALUATION_SEED

        config, whole = choose_rows(
            run, configure(run, settings, options), given_settings(settings, options)
        )
        result = evaluate_model(
            config,
            samples=samples,
            whole=whole,
            seed=EVALUATION_SEED if seed is None else seed,
            warn=lambda line: status.echo(f"warning: {line}", err=True),
            tell=lambda line: status.echo(line, err=True),
            heartbeat=status.heartbeat,
        )
    text = json.dumps(result.to_dict(), indent=2)
    click.echo(text if as_json else table(result))
    if out is not None:
        from localrl.runs.logs import write_atomic

        write_atomic(out, text.encode() + b"\n")


def given_settings(settings: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that --set and the options name."""
    from localrl.config import parse_setting

    given = dict(parse_setting(text) for text in settings)
    return given | settings_of(options)


def configure(run: Path | None, settings: tuple[str, ...], options: dict[str, Any]) -> RunConfig:
    """Return the settings of the run, if named, with its adapter; options and --set override them.

    Raises: ConfigError if there is no such run or it has no adapter.
    """
    from localrl.config import RunConfig

    given = given_settings(settings, options)
    if run is None:
        return RunConfig.create(given)
    file = run / "config.toml"
    if not file.is_file():
        raise ConfigError(
            f"There is no run in {run} (no config.toml). Pass a folder written by "
            "`localrl train`, or a model with --model and an adapter with --adapter."
        )
    if "lora.adapter" not in given:
        if not (run / "adapter" / "adapter_config.json").is_file():
            raise ConfigError(
                f"{run} has no adapter yet: one is written when the run ends. Resume it with "
                f"localrl train --resume --out {run}, or choose another with --adapter."
            )
        given["lora.adapter"] = str(run / "adapter")
    return RunConfig.of_run(file, given)


def choose_rows(
    run: Path | None, config: RunConfig, given: Mapping[str, Any]
) -> tuple[RunConfig, bool]:
    """Return the settings, and True to measure on all rows of the task's data.

    Of the data that a run was trained on, only the rows that it held out are measured; all others
    are taken whole, unless a number of prompts is given.

    Raises: ConfigError if the run held nothing out of its data, and no data are named.
    """
    from localrl.config import RunConfig
    from localrl.tasks.loading import is_data

    if not is_data(config.task.name):
        return config, False
    own = RunConfig.of_run(run / "config.toml").task if run else None
    if own is not None and _same(own.name, config.task.name):
        if own.held_out:
            return config, False
        if "task.name" not in given:
            raise ConfigError(
                f"{run} held nothing out of {own.name} (task.eval_prompts is 0). Name other "
                f"problems with --task, or --task {own.name} to measure on what it was trained on."
            )
    if "task.eval_prompts" not in given:
        config = config.replace("task.eval_prompts", None)
    return config, True


def _same(one: str, other: str) -> bool:
    """True if two names of tasks mean the same data."""
    paths = [Path(name).expanduser() for name in (one, other)]
    return one == other or (all(p.exists() for p in paths) and paths[0].samefile(paths[1]))


def table(result: Result) -> str:
    """Format the result as a table."""
    lines = [
        f"{result.task}: {result.prompts} {'held-out ' if result.held_out else ''}prompts, "
        f"{result.samples} completions each, "
        f"{sampled_at(result.temperature)}",
        f"{'':10}{'':>8}{'rate':>8}{'95 % interval':>18}",
    ]
    for name, side in (("base", result.base), ("adapter", result.with_adapter)):
        lines += _rows(name, side) if side is not None else []
    if result.difference is not None:
        lines += ["", _told(result.difference)]
    return "\n".join(lines)


def _rows(name: str, side: Side) -> list[str]:
    rows = [
        f"{name:10}{f'pass@{rate.k}':>8}{rate.rate:>8.3f}"
        f"{f'{rate.ci95[0]:.3f} to {rate.ci95[1]:.3f}':>18}"
        for rate in side.pass_at
    ]
    reward = "unknown" if side.mean_reward is None else fixed(side.mean_reward)
    rest = (
        f"{name:10}mean reward {reward}, {side.mean_completion_tokens:.1f} tokens, "
        f"{side.cut_off:.0%} cut off"
    )
    if side.unjudged:
        rest += f", {side.unjudged} of {side.completions} completions without a verdict"
    return [*rows, rest]


def _told(difference: Difference) -> str:
    interval = "unknown"
    if difference.ci95 is not None:
        interval = f"{difference.ci95[0]:+.3f} to {difference.ci95[1]:+.3f}"
    return (
        f"adapter - base  {difference.value:+.3f} in pass@1 ({interval}), p = {difference.p:.2g} "
        f"({difference.test}); better on {difference.adapter_better}, worse on "
        f"{difference.base_better} of {difference.prompts} prompts"
    )
