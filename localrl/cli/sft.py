"""`localrl sft`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localrl.cli.options import columns, device, set_option, settings_of
from localrl.cli.start import Starting, start, stopped_run
from localrl.errors import ConfigError

if TYPE_CHECKING:
    from localrl.config import RunConfig

TAKEN = ("model", "task", "lora")
"""Sections of settings that are taken from the run whose successes are learned from."""
NOT_TAKEN = ("task.demonstrations", "task.decided", "lora.adapter")
ALSO_TAKEN = (
    "rollout.max_prompt_tokens",
    "rollout.max_completion_tokens",
    "rollout.max_turns",
    "rollout.temperature",
    "rollout.stop_text",
)
"""Settings of sampling, for evaluations, that are taken too."""


@click.command(cls=Starting)
@click.argument("data", required=False)
@click.option(
    "--from-rollouts",
    metavar="RUN",
    help="Learn from the successful completions of this run, with its model and task.",
)
@click.option(
    "--model", metavar="MODEL", help="Folder, .gguf file or user/name; default: embedded."
)
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@device
@click.option("--adapter", metavar="DIR", help="Start from this adapter, or a run's.")
@columns
@click.option("--task", metavar="TASK", help="Also measure pass@1 on this task, before and after.")
@click.option("--reward", "rewards", multiple=True, metavar="REWARD", help="As for `train`.")
@click.option("--steps", type=int, help="Training steps.")
@click.option("--minutes", type=float, help="Stop training after this many minutes.")
@click.option("--seed", type=int, help="Seed of all random draws.")
@click.option("--eval-every", type=int, help="Also evaluate every N steps.")
@click.option("--out", metavar="DIR", help="Run folder; default: a new one under runs/.")
@click.option("--memory-limit", metavar="SIZE", help="Maximum memory of the process: 6GB or 70%.")
@set_option("Any other setting; rollout.prompts_per_step is the number of examples in a step.")
@click.option("--overwrite", is_flag=True, help="Move an existing run folder out of the way.")
@click.option("--resume", is_flag=True, help="Resume the run in --out, or the newest.")
@click.option(
    "--no-supervise", is_flag=True, help="Do not restart the run from a parent process if it dies."
)
@click.option(
    "--on-battery",
    type=click.Choice(["run", "pause"]),
    help="Below 30 % battery: keep running, or save and wait (default: pause).",
)
@click.option("--print-config", is_flag=True, help="Print the resolved settings and stop.")
def sft(
    settings: tuple[str, ...],
    overwrite: bool,
    resume: bool,
    no_supervise: bool,
    on_battery: str | None,
    print_config: bool,
    **flags: Any,
) -> None:
    """Start a model with worked examples, for `train --adapter` to go on from.

    DATA are rows with `messages`, or with a `prompt` and a `completion`, in any form that
    `train --task` reads. Only what the assistant says is learned.

    \b
      localrl sft worked.jsonl --model DIR --steps 25
      localrl sft worked.jsonl --model DIR --task countdown:1
      localrl sft --from-rollouts runs/steps-1 --steps 20
      localrl train --model DIR --task countdown:1 --adapter runs/sft-worked-1
    """
    from localrl.config import RunConfig, parse_setting

    given = dict(parse_setting(text) for text in settings)
    given |= settings_of(flags)

    def resolve() -> RunConfig:
        if resume:
            return RunConfig.of_run(
                stopped_run(flags["data"], overwrite, given), given, to_train=True
            )
        return _resolve(given, data=flags["data"], run=flags["from_rollouts"])

    start(
        resolve,
        overwrite=overwrite,
        resume=resume,
        no_supervise=no_supervise,
        on_battery=on_battery,
        print_config=print_config,
    )


def _resolve(given: dict[str, Any], *, data: str | None, run: str | None) -> RunConfig:
    """Return the settings of a supervised run.

    Raises: ConfigError if it is unclear what to learn from, or a setting would have no effect.
    """
    from localrl.config import ALIASES, RunConfig
    from localrl.tasks.loading import NO_TASK
    from localrl.training.supervised_settings import as_supervised

    if data and run:
        raise ConfigError("Choose one to learn from: DATA, or the run of --from-rollouts.")
    if "task.demonstrations" not in given:
        raise ConfigError(
            "Name what to learn from: a file of worked examples, as in localrl sft worked.jsonl, "
            "or a run with --from-rollouts."
        )
    given = {ALIASES.get(name, name): value for name, value in given.items()}
    taken = _of_run(Path(run).expanduser()) if run else {"task.name": NO_TASK}
    return as_supervised(RunConfig.create({**taken, **given}))


def _of_run(run: Path) -> dict[str, Any]:
    """Return the settings that learning from a run's completions takes over from it."""
    from localrl.config import RunConfig, keys

    file = run / "config.toml"
    if not (run / "run.json").is_file() or not file.is_file():
        raise ConfigError(
            f"There is no run in {run} (no config.toml). Name the folder that `localrl train` "
            "wrote, for example runs/steps-1."
        )
    config = RunConfig.of_run(file)
    wanted = [key for key in keys() if key.partition(".")[0] in TAKEN or key in ALSO_TAKEN]
    return {key: config.value(key) for key in wanted if key not in NOT_TAKEN}
