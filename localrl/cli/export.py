"""`localrl export`: the adapter, or the model with the adapter fused in, for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localrl.cli.options import device
from localrl.errors import ConfigError, LocalRLError

if TYPE_CHECKING:
    from localrl.config import RunConfig
    from localrl.export.adapters import Adapter
    from localrl.export.fused import Fused
    from localrl.export.gguf import WrittenGGUF

SHOWN_PROMPTS = 3
MOST_TOKENS = 128
"""Length limit of a text generated for comparison, in tokens."""
GOOD_COSINE = 0.98
NOTHING = "kept     nothing: the adapter's update is zero"
NAMES = {8: "Q8_0", 16: "F16"}
"""Number formats of GGUF files, by bits."""


@dataclass(frozen=True)
class _Source:
    """The source of an export: an adapter, its model, and the run they come from."""

    adapter: Path
    model: Path
    name: str | None
    """The model as the user named it."""
    config: RunConfig | None
    """Settings of the run; None if the adapter is not from a run."""

    @property
    def base_bits(self) -> int:
        return self.config.model.quantize if self.config else 0


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--fused", is_flag=True, help="Write a complete model with the adapter merged in.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Dtype of the fused model; default: float16, or float32 where that loses too much.",
)
@click.option(
    "--quantize",
    type=click.Choice(["4", "8"]),
    help="Quantise the fused model to 4 or 8 bits; most of a small update is then lost.",
)
@click.option(
    "--gguf",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Write one file for Ollama, LM Studio and llama.cpp, with the adapter merged in.",
)
@click.option(
    "--bits",
    type=click.Choice(["8", "16"]),
    help="Bits per number in the GGUF file: 8 (Q8_0) or 16 (F16).  [default: 8]",
)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="A new folder.")
@click.option("--base-id", metavar="ID", help="The unquantised base model on the Hub, user/name.")
@click.option("--model", metavar="MODEL", help="The model, if RUN is an adapter folder.")
@device
def export(
    run: Path,
    fused: bool,
    dtype: str | None,
    quantize: str | None,
    gguf: str | None,
    bits: str | None,
    out: Path | None,
    base_id: str | None,
    model: str | None,
    device: str | None,
) -> None:
    """Export a run's adapter, or a model that contains it, for other programs.

    \b
      localrl export runs/steps-1                    its adapter, for mlx-lm and PEFT
      localrl export runs/problems-1 --gguf          one file, for Ollama and LM Studio
      localrl export runs/steps-1 --fused            a complete model, for everything else
      localrl export ADAPTER --model DIR --out new   an adapter from elsewhere
    """
    if not fused and (dtype or quantize):
        flag = "--dtype" if dtype else "--quantize"
        raise ConfigError(f"{flag} needs --fused. Add it, or remove this option.")
    if gguf is None and bits:
        raise ConfigError("--bits needs --gguf. Add it, or remove this option.")
    if gguf is not None and (fused or out):
        flag = "--fused" if fused else "--out"
        raise ConfigError(
            f"{flag} cannot be combined with --gguf, which writes one file: --gguf FILE."
        )
    source = _open(run, model)
    _choose_device(source, device)
    adapter = _read(source, base_id)
    if gguf is not None:
        _gguf(run, source, adapter, gguf, int(bits or 8))
    elif fused:
        _fused(source, adapter, out or _below(run, source), dtype, quantize)
    else:
        _adapter(adapter, source, out)


def _open(run: Path, model: str | None) -> _Source:
    """Find the adapter and its model.

    Raises: ConfigError if there is neither a run nor an adapter with its model.
    """
    from localrl.config import RunConfig
    from localrl.policy.loading import find_model

    if (run / "config.toml").is_file():
        config = RunConfig.of_run(run / "config.toml")
        name = model or config.model.path
        return _Source(run / "adapter", find_model(name), name, config)
    if (run / "adapter_config.json").is_file():
        if model is None:
            raise ConfigError(f"{run} is an adapter, not a run. Pass its model with --model.")
        return _Source(run, find_model(model), model, None)
    raise ConfigError(
        f"There is nothing to export in {run}: it contains neither a run's config.toml nor an "
        "adapter_config.json."
    )


def _choose_device(source: _Source, device: str | None) -> None:
    """Compute on the device that was asked for, or else on the run's."""
    from localrl import backend

    backend.compute_on_cpu((device or (source.config and source.config.model.device)) == "cpu")


def _read(source: _Source, base_id: str | None) -> Adapter:
    """Read the adapter and fill in its model's type and id."""
    from localrl.export.adapters import read_adapter
    from localrl.export.base import find_base_id
    from localrl.policy.folder import check_folder

    adapter = read_adapter(source.adapter)
    given = base_id or (source.config.model.base_id if source.config else None) or adapter.base_id
    return replace(
        adapter,
        model_type=check_folder(source.model)["model_type"],
        base_id=find_base_id(given, source.model, source.name),
    )


def _below(run: Path, source: _Source) -> Path:
    """Return the default folder of a fused model, inside its run."""
    if source.config is None:
        raise ConfigError("There is no run to write into. Name a new folder with --out.")
    return run / "fused"


def _adapter(adapter: Adapter, source: _Source, out: Path | None) -> None:
    from localrl.export.adapters import write_adapter

    if out is None and source.config is None:
        raise ConfigError("There is no run to write into. Name a new folder with --out.")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty. Choose another folder with --out.")
    reason = write_adapter(adapter, out or source.adapter)
    click.echo(f"adapter  {out or source.adapter}: rank {adapter.rank}, scale {adapter.scale:g}")
    if reason is not None:
        click.echo(f"mlx-lm only: {reason}, so no weights were written in PEFT format")
    elif adapter.base_id is None:
        click.echo(
            "base     unknown: pass the unquantised model with --base-id so PEFT can find it"
        )
    else:
        click.echo(f"base     {adapter.base_id}")


def _fused(
    source: _Source, adapter: Adapter, out: Path, dtype: str | None, quantize: str | None
) -> None:
    from localrl.display.line import showing
    from localrl.export.fused import export_fused

    with showing("merging the adapter into the model") as status:
        made = export_fused(
            adapter,
            source.model,
            out,
            base_bits=source.base_bits,
            dtype=dtype,
            bits=int(quantize) if quantize else None,
        )
        form = f"{made.bits} bits" if made.bits else f"{made.dtype}: {made.reason}"
        status.echo(f"fused    {made.folder} ({form})")
        status.now("comparing the written model with the adapter")
        for line in [*_kept(made), *_compared(source, adapter, out)]:
            status.echo(line)


def _gguf(run: Path, source: _Source, adapter: Adapter, file: str, bits: int) -> None:
    from localrl.display.line import showing
    from localrl.export.gguf import export_gguf

    if not file and source.config is None:
        raise ConfigError("There is no run to write into. Name a new file after --gguf.")
    compared: list[str] = []
    with showing("writing a GGUF file") as status:
        made = export_gguf(
            adapter,
            source.model,
            Path(file) if file else run / f"{run.resolve().name}.{NAMES[bits]}.gguf",
            bits=bits,
            base_bits=source.base_bits,
            tell=lambda line: status.echo(f"gguf     {line}"),
            look=lambda folder: compared.extend(_compared(source, adapter, folder)),
        )
    for line in [*_rounded(made), *compared]:
        click.echo(line)


def _rounded(made: WrittenGGUF) -> list[str]:
    """Report how much of the update a GGUF file keeps, and its rounding error."""
    from localrl.export.fused import median

    lines = [f"rounding {made.rounding:.2g} of the weights, as in any {NAMES[made.bits]} file"]
    if not made.layers:
        return [*lines, NOTHING]
    noise = median([layer.error for layer in made.layers])
    least = min(made.layers, key=lambda layer: layer.share)
    lines.append(
        f"kept     {median([layer.share for layer in made.layers]):.2f} of the update; rounding is "
        f"{noise:.2g} times its size (median of {len(made.layers)} layers; least kept: "
        f"{least.share:.2f}, {least.name})"
    )
    if noise > 1 and made.bits == 8:
        lines.append("note: rounding is larger than the learned update; --bits 16 rounds less")
    return lines


def _kept(made: Fused) -> list[str]:
    """Report how much of the update is in the model, measured on its files."""
    from localrl.export.fused import median

    if not made.layers:
        return [NOTHING]
    errors = [layer.error for layer in made.layers]
    cosines = [layer.cosine for layer in made.layers]
    worst = max(made.layers, key=lambda layer: layer.error)
    lines = [
        f"kept     relative error {median(errors):.2g}, cosine {median(cosines):.4f} of the update "
        f"(median of {len(errors)} layers)",
        f"worst    relative error {max(errors):.2g}, cosine {min(cosines):.4f} ({worst.name})",
    ]
    if median(cosines) < GOOD_COSINE:
        instead = "without --quantize" if made.bits else "with --dtype float32"
        lines.append(f"warning: this model lost much of the learned update; export it {instead}")
    return lines


def _compared(source: _Source, adapter: Adapter, out: Path) -> list[str]:
    """Compare greedy texts of both models on prompts of the run's task."""
    from localrl import backend
    from localrl.export.compare import greedy_pairs

    try:
        prompts = _prompts(source)
    except LocalRLError as error:
        return [f"greedy   not compared: {error}"]
    if not prompts:
        return ["greedy   not compared: there is no task to take prompts from"]
    most = source.config.rollout.max_completion_tokens if source.config else MOST_TOKENS
    pairs = list(
        greedy_pairs(
            adapter,
            source.model,
            out,
            prompts,
            most=min(most, MOST_TOKENS),
            base_bits=source.base_bits,
            on_cpu=backend.describe().device == "cpu",
        )
    )
    return _told(pairs)


def _told(pairs: Sequence[tuple[str, str]]) -> list[str]:
    from localrl.utils.text import printable

    alike = sum(one == other for one, other in pairs)
    lines = [
        f"greedy   {alike} of {len(pairs)} held-out prompts get the same text from base + adapter "
        "and from the fused model"
    ]
    for one, other in pairs:
        if one != other:
            lines += [
                f"  base + adapter  {printable(one)}",
                f"  fused           {printable(other)}",
            ]
    return lines


def _prompts(source: _Source) -> list[tuple[int, ...]]:
    """Encode a few held-out prompts of the run's task."""
    from localrl.policy.tokenizer import load_tokenizer
    from localrl.processes.worker import Worker
    from localrl.rewards.catalog import parse_rewards
    from localrl.tasks.loading import open_task

    if source.config is None:
        return []
    task = source.config.task
    rewards = parse_rewards(task.rewards, task.reward_weights or None)
    limits = {"time_limit_s": task.reward_timeout_s}
    with Worker(**limits, memory_limit_bytes=task.reward_memory_mb * 2**20) as worker:
        examples = open_task(task, rewards, worker).evaluation(SHOWN_PROMPTS)
    tokenizer = load_tokenizer(source.model, source.config.model)
    return tokenizer.encode_prompts(examples)
