"""Dashboards: sends the numbers of a run, and nothing else, to TensorBoard and W&B.

Each is an extra that is imported only if `run.report_to` names it. No text is ever sent: no prompts
or completions, no paths, no code, no terminal output.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from localrl.errors import ConfigError

NAMES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Values of `run.report_to`, and the package that each needs."""

Numbers = Mapping[str, float]


@dataclass
class Dashboard:
    """An open dashboard."""

    name: str
    write: Callable[[int, Numbers], None]
    """Writes the numbers of a step."""
    close: Callable[[], None]
    broken: bool = False


def start(
    names: Sequence[str], run: Path, settings: Mapping[str, Any], step: int = 0
) -> list[Dashboard]:
    """Open the named dashboards for the run in this folder, which continues after `step`.

    settings: those that are numbers are sent to W&B.

    Raises: ConfigError, see `check`, or if one cannot be opened.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    opened: list[Dashboard] = []
    for name, module in check(names).items():
        try:
            opened.append(openers[name](module, run, _numbers(settings), step))
        except Exception as error:  # another package's, of any kind
            hint = " (or set WANDB_MODE=offline)" if name == "wandb" else ""
            raise ConfigError(
                f"{name} cannot be started: {error} Fix that{hint}, or remove it from "
                "run.report_to."
            ) from error
    return opened


def check(names: Sequence[str]) -> dict[str, ModuleType]:
    """Import and return the packages that the named dashboards need.

    Raises: ConfigError if a name is unknown or occurs twice, or its package is not installed.
    """
    return {name: _package(name, names) for name in names}


def log(
    dashboards: Sequence[Dashboard], record: Mapping[str, Any], warn: Callable[[str], None]
) -> None:
    """Send the numbers of a line of metrics.jsonl. A failing dashboard is reported, then
    skipped."""
    for dashboard in dashboards:
        _try(dashboard, lambda d: d.write(record["step"], _numbers(record)), warn)


def finish(dashboards: Sequence[Dashboard], warn: Callable[[str], None]) -> None:
    """Write all remaining data, and close the dashboards."""
    for dashboard in dashboards:
        _try(dashboard, lambda d: d.close(), warn)


def _try(
    dashboard: Dashboard, act: Callable[[Dashboard], None], warn: Callable[[str], None]
) -> None:
    """Call a dashboard; a full disk or a lost network must not end the run."""
    if dashboard.broken:
        return
    try:
        act(dashboard)
    except Exception as error:  # another package's, of any kind
        dashboard.broken = True
        warn(f"{dashboard.name} failed and is switched off: {error}. The run continues.")


def _package(name: str, names: Sequence[str]) -> ModuleType:
    if name not in NAMES or list(names).count(name) > 1:
        raise ConfigError(
            f"run.report_to is {list(names)}; it may contain {' and '.join(NAMES)}, each once."
        )
    try:
        return importlib.import_module(NAMES[name])
    except ImportError as error:
        raise ConfigError(
            f"run.report_to names {name}, but {NAMES[name]} cannot be imported ({error}). Install "
            f"it with pip install 'localrl[{name}]', or leave it out."
        ) from None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return only the finite numbers; booleans as 0 and 1."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (bool, int, float)) and math.isfinite(value)
    }


def _tensorboard(module: Any, run: Path, settings: Numbers, step: int) -> Dashboard:
    """Write event files to `tensorboard/` in the run folder; repeated steps replace earlier
    ones."""
    purge = step + 1 if step else None
    writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=purge)

    def write(step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            if name != "step":
                writer.add_scalar(name.replace("@", "_"), value, step)  # no @ allowed

    return Dashboard("tensorboard", write, writer.close)


def _wandb(module: Any, run: Path, settings: Numbers, step: int) -> Dashboard:
    """Open a run in project $WANDB_PROJECT, or `localrl`; W&B's own collecting is switched off."""
    quiet = module.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        host="unnamed",
        username="unnamed",
    )
    # The marker is written once, so a resumed run has the same id.
    id = hashlib.sha256((run / "run.json").read_bytes()).hexdigest()[:16]
    opened = module.init(
        project=os.environ.get("WANDB_PROJECT", "localrl"),
        dir=str(run),
        id=id,
        resume="allow",
        config=dict(settings),
        settings=quiet,
    )
    opened.define_metric("*", step_metric="step")

    def write(step: int, numbers: Numbers) -> None:
        opened.log({**numbers, "step": step})

    return Dashboard("wandb", write, opened.finish)
