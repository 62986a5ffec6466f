"""`localrl bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from localrl.cli.options import device, set_option
from localrl.diagnostics.recipes import RECIPES
from localrl.errors import ConfigError

if TYPE_CHECKING:
    from localrl.diagnostics.bench import DecodeRate, Opened
    from localrl.diagnostics.bench_profile import Profile
    from localrl.diagnostics.bench_shapes import PublishedShape, StepRate

SIZES = ("rows", "tokens", "prompt_tokens", "quantize")
"""Parameters that a shape sets."""
MEASURING = (*SIZES, "repeats", "device", "shape", "with_profile", "as_json")
"""Parameters that a recipe has no use for."""
OF_RECIPES = ("data", "problems", "out", "settings")
"""Parameters that only a recipe has a use for."""


def _counts(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Parse a comma-separated list into distinct, sorted numbers."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers. Write it like 1,2,4,8."
        ) from None


@click.command()
@click.option(
    "--model", metavar="MODEL", help="Folder, .gguf file or user/name; default: embedded."
)
@click.option("--quantize", type=int, default=0, metavar="BITS", help="As for `train`.")
@click.option(
    "--rows",
    default="1,2,4,8,16",
    callback=_counts,
    show_default=True,
    help="Numbers of completions decoded at once; the largest is also the group size trained.",
)
@click.option("--tokens", default=64, show_default=True, help="Tokens in a completion.")
@click.option("--prompt-tokens", default=32, show_default=True, help="Tokens in the prompt.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of measurements after a warm-up; medians are shown.",
)
@device
@click.option(
    "--shape",
    type=click.Choice(["qwen3-0.6b", "qwen3.5-0.8b"]),
    help="Measure whole steps in the sizes of published figures, and show these too.",
)
@click.option("--profile", "with_profile", is_flag=True, help="Show where a step spends its time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    help="Run a published comparison with localrl's strategies. Takes hours; not yet run on a Mac.",
)
@click.option("--data", metavar="TASK", help="With --recipe: other problems, as for --task.")
@click.option(
    "--problems",
    type=click.IntRange(1),
    help="With --recipe: problems to train on, each seen once by every strategy.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="With --recipe: folder of the runs; default: runs/RECIPE.",
)
@set_option("With --recipe: any setting of `train`, for all strategies.")
def bench(
    model: str | None,
    quantize: int,
    rows: tuple[int, ...],
    tokens: int,
    prompt_tokens: int,
    repeats: int,
    device: str | None,
    shape: str | None,
    with_profile: bool,
    as_json: bool,
    recipe: str | None,
    data: str | None,
    problems: int | None,
    out: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Measure how fast this machine decodes and trains a model.

    Prompts and rewards are dummies, and nothing is saved, except with --recipe, which trains, and
    continues where it was stopped. Other running programs make the numbers worse.

    \b
      localrl bench
      localrl bench --model path/to/model --rows 1,8 --tokens 128 --profile
      localrl bench --shape qwen3-0.6b           one step of 4 completions of 256 tokens
      localrl bench --recipe gsm8k-cppo          CPPO's table on GSM8K, see docs/mac.md
    """
    if recipe is not None:
        _refuse(MEASURING, "--recipe has no use for {}. Remove it.")
        from localrl.cli.recipe import run_recipe
        from localrl.config import parse_setting
        from localrl.diagnostics.recipe_runs import Changes

        given = dict(parse_setting(text) for text in settings)
        folder = out or Path("runs") / recipe
        run_recipe(recipe, Changes(folder, model, data, problems, given))
        return
    _refuse(OF_RECIPES, "{} needs --recipe. Add it, or remove {}.")
    if shape is not None:
        _bench_shape(shape, model, repeats, device or "auto", with_profile, as_json)
        return
    from localrl.diagnostics.bench import BenchRequest, measure, open_bench

    request = BenchRequest(rows, prompt_tokens, tokens, repeats)
    opened = open_bench(model, quantize, request, device or "auto")
    if not as_json:
        for text in opened.left_out:
            click.echo(f"skipped, not enough memory: {text}")
        click.echo("rows   tokens/s     ms/token   floor, ms   first, ms   MLX's peak, MB")
    report = measure(opened, (lambda rate: None) if as_json else _show_rate)
    profiled = None
    if with_profile:
        from localrl.diagnostics.bench_profile import profile

        profiled = profile(opened)
        report["profile"] = _as_json(profiled)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _show(report)
    if profiled:
        _show_profile(profiled)


def _refuse(parameters: tuple[str, ...], message: str) -> None:
    """Raise ConfigError if one of these parameters is given. message: with {} for its option."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name not in parameters:
            continue
        if context.get_parameter_source(option.name) != ParameterSource.DEFAULT:
            raise ConfigError(message.replace("{}", option.opts[0]))


def _bench_shape(
    name: str, model: str | None, repeats: int, device: str, with_profile: bool, as_json: bool
) -> None:
    """Measure whole steps of a shape, and print them beside the published figures."""
    from dataclasses import asdict

    from localrl.diagnostics.bench_shapes import SHAPES, measure_steps, open_shape

    _refuse(SIZES, "--shape sets its own sizes. Remove {}.")
    shape = SHAPES[name]
    opened = open_shape(shape, model, repeats, device)
    rate = measure_steps(opened)
    profiled = None
    if with_profile:
        from localrl.diagnostics.bench_profile import profile

        profiled = profile(opened)
    if as_json:
        from localrl.diagnostics.bench import facts

        report = {**facts(opened), "shape": name, "step": asdict(rate), "published": asdict(shape)}
        report |= {"profile": _as_json(profiled)} if profiled else {}
        click.echo(json.dumps(report, indent=2))
        return
    _show_shape(shape, opened, rate)
    if profiled:
        _show_profile(profiled)


def _show_shape(shape: PublishedShape, opened: Opened, rate: StepRate) -> None:
    from localrl import backend

    path, here = opened.config.model.path, backend.describe().device
    click.echo(
        f"a step: {shape.completions} completions of {shape.tokens} tokens after a prompt of "
        f"{shape.prompt_tokens}, all trained\n\n"
        f"{'':24}{'sampling, tokens/s':>20}{'update, s':>12}{'steps/s':>10}{'peak, GB':>10}"
    )
    _show_steps(f"localrl here ({here})", rate)
    click.echo("published")
    for figure in shape.figures:
        _show_steps(f"  {figure.tool}", figure.rate)
    click.echo(f"\nNot measured by localrl: {shape.source}. Settings and losses differ.")
    if path != shape.model:
        click.echo(f"The published figures are of {shape.model}, yours of {path}.")


def _show_steps(name: str, rate: StepRate) -> None:
    tokens, update, peak = rate.rollout_tokens_per_s, rate.update_s, rate.peak_bytes
    click.echo(
        f"{name:24}{'-' if tokens is None else f'{tokens:.0f}':>20}"
        f"{'-' if update is None else f'{update:.3f}':>12}{rate.steps_per_s:>10.3f}"
        f"{'-' if peak is None else f'{peak / 1e9:.2f}':>10}"
    )


def _show_rate(rate: DecodeRate) -> None:
    floor = "-" if rate.floor_ms is None else f"{rate.floor_ms:.2f}"
    click.echo(
        f"{rate.rows:4}{rate.tokens_per_s:11.0f}{rate.step_ms:13.2f}{floor:>12}{rate.first_ms:12.1f}"
        f"{rate.peak_bytes / 1e6:17.0f}"
    )


def _show(report: dict) -> None:
    fit, update, rates = report["fit"], report["update"], report["rates"]
    if rates:
        click.echo(
            f"floor: {rates['bytes_per_s'] / 1e9:.1f} GB/s memory reads, "
            f"{rates['flops_per_s'] / 1e9:.0f} GFLOP/s in matrix products; {report['kernels']}"
        )
    if fit:
        length = "" if fit["c_ms"] is None else f" + {1e3 * fit['c_ms']:.3f} us x rows x length"
        click.echo(
            f"a token takes {fit['a_ms']:.2f} ms + {fit['b_ms']:.3f} ms x rows{length}; "
            f"fit residual {fit['residual']:.0%}"
        )
    click.echo(
        f"update: {update['positions']} positions of {update['completions']} completions in "
        f"{update['update_s']:.2f} s, {update['positions_per_s']:.0f} positions/s, MLX's peak "
        f"{update['peak_bytes'] / 1e6:.0f} MB"
    )


def _show_profile(profile: Profile) -> None:
    click.echo(f"\none step, one prompt: {profile.step_s:.3f} s")
    for stage in profile.stages:
        share = stage.seconds / profile.step_s
        click.echo(f"  {stage.name:28}{1e3 * stage.seconds:9.1f} ms{share:7.0%}  x {stage.calls}")


def _as_json(profile: Profile) -> dict:
    from dataclasses import asdict

    return asdict(profile)
