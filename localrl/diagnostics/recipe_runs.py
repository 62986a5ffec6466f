"""The runs of a recipe: their settings and folders, which are done, and the table they give."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localrl.config import RunConfig
from localrl.diagnostics.recipes import PublishedRun, Recipe, Settings
from localrl.errors import ConfigError
from localrl.runs.logs import write_atomic

DONE = "eval.json"
"""Last file that a run writes."""
WIDTH = 26
"""Width of the table's first column."""


@dataclass(frozen=True)
class Changes:
    """The user's changes to a recipe; None where there is none."""

    out: Path
    model: str | None = None
    data: str | None = None
    problems: int | None = None
    """Training problems of every arm."""
    settings: Settings | None = None
    """Settings of all arms, over everything else."""


@dataclass(frozen=True)
class ArmRun:
    """The run of one strategy."""

    name: str
    folder: Path
    settings: Settings
    """All settings but the folder."""

    @property
    def file(self) -> Path:
        """File with its settings, beside its folder."""
        return self.folder.with_suffix(".toml")

    @property
    def begun(self) -> bool:
        """True if the folder holds a run."""
        return (self.folder / "config.toml").is_file()

    @property
    def done(self) -> bool:
        """True if that run is finished, its last evaluation included."""
        return (self.folder / DONE).is_file()

    @property
    def completions(self) -> int:
        """Most completions that the run samples for training."""
        sizes = ("run.steps", "rollout.prompts_per_step", "rollout.group_size")
        return math.prod(self.settings[name] for name in sizes)


@dataclass(frozen=True)
class ArmResult:
    """The result of one strategy."""

    arm: str
    before: float | None
    """Share of right answers to the held-out problems."""
    after: float | None
    interval: tuple[float, float] | None
    """95 % interval of `after`."""
    tokens: int
    """Generated in training, not in evaluations."""
    seconds: float
    """Seconds of training steps, without evaluations."""


def plan(recipe: Recipe, changes: Changes) -> list[ArmRun]:
    """Return the runs to make.

    Raises: ConfigError if the settings cannot be, or a folder has a run of other settings.
    """
    if changes.data is not None and changes.problems is None:
        raise ConfigError(
            f"Of {changes.data} nobody knows how many problems to train on. Say it with --problems."
        )
    if "run.out" in (changes.settings or {}):
        raise ConfigError("Every run has a folder of its own. Name the one around them with --out.")
    runs = [_arm(recipe, changes, name) for name in recipe.arms]
    for run in runs:
        if not RunConfig.create(run.settings).task.held_out:
            raise ConfigError(
                "The table is of held-out problems: task.eval_prompts cannot be 0 here."
            )
        if run.begun:
            _check_same(run)
    return runs


def _arm(recipe: Recipe, changes: Changes, name: str) -> ArmRun:
    problems = recipe.problems if changes.problems is None else changes.problems
    settings = {
        **recipe.settings,
        "model.path": changes.model or recipe.model,
        "task.name": changes.data or recipe.data,
        "task.train_prompts": problems,
        "task.eval_prompts": recipe.held_out,
        **recipe.arms[name],
        **(changes.settings or {}),
    }
    prompts = min(problems, settings["rollout.prompts_per_step"])
    steps = {"run.steps": math.ceil(problems / prompts)}
    slug = re.sub(r"\W+", "-", name.lower())
    return ArmRun(
        name, changes.out / slug, {**steps, **settings, "rollout.prompts_per_step": prompts}
    )


def _check_same(run: ArmRun) -> None:
    """Raise ConfigError if the run in the folder has other settings.

    They are compared with those that it was begun with: a run may lower some itself.
    """
    if not run.file.is_file():
        raise ConfigError(
            f"The run in {run.folder} is not of this comparison. Choose another --out."
        )
    wanted, there = RunConfig.create(run.settings), RunConfig.create(file=run.file)
    for key in run.settings:
        if wanted.value(key) != there.value(key):
            raise ConfigError(
                f"The run in {run.folder} has {key} = {there.value(key)!r}, not "
                f"{wanted.value(key)!r}. Give the options that it was begun with, or another --out."
            )


def write_settings(run: ArmRun) -> None:
    """Keep the settings that the run begins with."""
    config = RunConfig.create({**run.settings, "run.out": str(run.folder)})
    run.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(run.file, config.to_toml().encode())


def result(run: ArmRun) -> ArmResult:
    """Read the result of a finished run."""
    from localrl.report.curves import tokens_so_far
    from localrl.report.reading import read_run

    read = read_run(run.folder)
    first, last = read.scores[0], read.scores[-1]
    tokens = tokens_so_far(read.steps)
    return ArmResult(
        run.name,
        first.pass_at_1,
        last.pass_at_1,
        last.interval,
        int(tokens[-1]) if tokens else 0,
        sum(step.get("step_time") or 0.0 for step in read.steps),
    )


def record(name: str, recipe: Recipe, runs: Sequence[ArmRun], versions: Settings) -> dict[str, Any]:
    """Return everything that the table says, and what it was made with."""
    return {
        "recipe": name,
        "made_with": dict(versions),
        "settings": {run.name: dict(run.settings) for run in runs},
        "results": [asdict(result(run)) for run in runs],
        "published": [asdict(line) for line in recipe.published],
        "published_by": recipe.source,
    }


def table(recipe: Recipe, runs: Sequence[ArmRun]) -> Iterator[str]:
    """Yield the lines of the table: what was measured here, then what was published."""
    sizes: Mapping[str, Any] = runs[0].settings
    yield (
        f"{sizes['model.path']}, {sizes['task.train_prompts']:,} problems of {sizes['task.name']}, "
        "each seen once"
    )
    shares = f"{'right answers, %':{WIDTH}}{'before':>8}{'after':>8}{'95 % interval':>18}"
    yield f"{shares}{'tokens':>14}{'seconds':>10}"
    yield "measured here"
    for run in runs:
        yield _measured(result(run))
    yield f"published: {recipe.source}"
    for line in recipe.published:
        yield _published(line)
    yield f"Not measured by localrl, and on another machine: {recipe.differences}."


def _measured(found: ArmResult) -> str:
    interval = " to ".join(f"{100 * end:.1f}" for end in found.interval or ()) or "-"
    return (
        f"  {found.arm:{WIDTH - 2}}{_share(found.before):>8}{_share(found.after):>8}{interval:>18}"
        f"{found.tokens:>14,}{found.seconds:>10,.0f}"
    )


def _published(line: PublishedRun) -> str:
    seconds = "-" if line.seconds is None else f"{line.seconds:,.0f}"
    name, share = f"  {line.method:{WIDTH - 2}}", _share(line.accuracy)
    return f"{name}{'':8}{share:>8}{'-':>18}{'-':>14}{seconds:>10}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
