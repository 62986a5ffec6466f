"""Resuming a run: its folder reopened, and the checkpoint that it continues from."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrl.config import RunConfig, keys
from localrl.errors import ConfigError
from localrl.export.adapters import CONFIG as ADAPTER_CONFIG
from localrl.memory.adapting import smaller
from localrl.processes.child import Restart
from localrl.records import MemoryPlan
from localrl.rollouts.groups import Shape
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.folder import STEP_LOGS, RunFolder, reopen_run
from localrl.settings import LoraConfig
from localrl.training.state import State, check_sources, read, restore

if TYPE_CHECKING:
    from localrl.training.session import Session

MAY_CHANGE = (
    "run.steps",
    "run.minutes",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep_every",
    "run.report_to",
    "run.rollout_log_limit",
    "task.reward_timeout_s",
    "task.reward_memory_mb",
    "task.tool_timeout_s",
    "task.agent_timeout_s",
    "model.selfcheck",
)
"""Settings that may change when a run is resumed: none of them changes the result of a step, except
that `learning.lr_schedule` may depend on the number of steps."""

MAY_RISE = ("rollout.max_prompt_tokens",)
"""Settings that may only be raised: what they allowed before stays as it was."""
SINCE = ("model.template_date",)
"""Settings that older runs have no value of, and every run gets one."""
DERIVED = ("rank", "scale", "layers", "keys")
"""Settings of `lora` that the adapter to start from decides."""


@dataclass(frozen=True, eq=False)
class PreviousRun:
    """The run of an earlier process, locked."""

    run: RunFolder
    state: State | None
    """The state that it continues from; None if it has no checkpoint: then the run starts over."""
    changed: Mapping[str, tuple[Any, Any]]
    """Settings whose values have changed."""
    unused: Sequence[int] = ()
    """Steps of intact checkpoints after that state, whose metrics have lost lines."""

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan of its last checkpoint."""
        return self.state.values["plan"] if self.state else None

    def plan_after(self, restart: Restart | None, shape: Shape) -> MemoryPlan | None:
        """Return the plan to continue with: the run's, or what the last supervised process left."""
        if restart is None:
            return self.plan
        plan = MemoryPlan(**json.loads((self.run.path / "plan.json").read_bytes()))
        least_rows = shape.leaves if shape.leaves > shape.roots else 1
        return smaller(plan, least_rows=least_rows) if restart.smaller else plan

    def check_sources(self, sources: Mapping[str, str]) -> None:
        """Check that model, data and starting adapter are those of its checkpoint.

        Raises: CheckpointError if they are not.
        """
        if self.state is not None:
            check_sources(self.state.values["sources"], sources)

    def continue_in(self, session: Session) -> None:
        """Continue the run in this session, and cut logs written after its checkpoint.

        Raises: CheckpointError if it cannot be continued.
        """
        step = 0
        if self.state is not None:
            restore(self.state, session)
            step = self.state.step
        nothing: Mapping[str, int] = dict.fromkeys(STEP_LOGS, 0)
        offsets = self.state.values["offsets"] if self.state else nothing
        unused = [path.name for path in session.checkpoints.set_aside(self.unused)]
        lost = self.run.cut(step, offsets)
        session.step = step
        changed = {key: {"was": old, "is": new} for key, (old, new) in self.changed.items()}
        self.run.event("resumed", step=step, changed=changed, unused=unused, lost=lost)
        if unused:
            session.progress.warn(
                f"metrics.jsonl has lost lines that were there at the checkpoint of step "
                f"{max(self.unused)}: the run continues from step {step}. Newer checkpoints are "
                f"kept in {session.checkpoints.folder}, as {', '.join(unused)}"
            )
        if lost:
            session.progress.warn(
                f"lines of the steps up to {step} are missing in {' and '.join(lost)}: the run "
                "continues from there without them"
            )


@contextmanager
def reopen(config: RunConfig, warn: Callable[[str], None]) -> Iterator[PreviousRun]:
    """Reopen the run in `config.run.out`, locked, with its newest intact state.

    Raises: ConfigError if there is none, another process uses it, or settings have changed that
    must not; CheckpointError if all its checkpoints are damaged.
    """
    folder = Path(config.run.out or "")
    with reopen_run(folder, rollout_log_limit=config.run.rollout_log_limit) as run:
        changed = changed_settings(RunConfig.of_run(folder / "config.toml", to_train=True), config)
        checkpoints = Checkpoints(folder / "checkpoints", warn)
        checkpoints.sweep()
        state, unused = _to_continue(checkpoints, run)
        yield PreviousRun(run, state, changed, unused)


def _to_continue(checkpoints: Checkpoints, run: RunFolder) -> tuple[State | None, list[int]]:
    """Return the newest intact state whose metrics are all there, and the steps of newer ones.

    If no state but that of step 0 has all of them, it is the newest: lost lines are not worth all
    training. Lost rollouts, which a repeated step would write again, are worth none.
    """
    newest: State | None = None
    newer: list[int] = []
    for path in checkpoints.intact():
        state = read(path)
        newest = newest or state
        if state.step == 0:
            break
        if run.has_metrics(state.step, state.values["offsets"]):
            return state, newer
        newer.append(state.step)
    return newest, []


def continued(config: RunConfig) -> RunConfig | None:
    """Return the settings of a run that is resumed without the adapter it began with, since its
    checkpoint has replaced it; None for a run that began without one, or needs it.

    Rank, scale, layers and keys are the run's, unless the settings have others.

    Raises: ConfigError if it needs the adapter, and that is gone.
    """
    start, folder = config.lora.adapter, Path(config.run.out or "")
    if start is None or not (folder / "config.toml").is_file():
        return None
    has_checkpoint = any((folder / "checkpoints").glob("step-*"))
    if has_checkpoint and not config.learning.kl_coef:
        old = RunConfig.of_run(folder / "config.toml").lora
        for name in DERIVED:
            if getattr(config.lora, name) == getattr(LoraConfig(), name):
                config = config.replace(f"lora.{name}", getattr(old, name))
        return config
    if not (Path(start) / ADAPTER_CONFIG).is_file():
        why = "its KL is measured from it" if has_checkpoint else "it has no checkpoint yet"
        raise ConfigError(
            f"The adapter that the run in {folder} began with is no longer in {start}, and "
            f"resuming the run needs it: {why}. Put it back, or start a new run."
        )
    return None


def day_of_run(config: RunConfig) -> str | None:
    """Return the day that chat templates see in the run of `config.run.out`; None if it says none,
    or if there is no run."""
    file = Path(config.run.out or "") / "config.toml"
    return RunConfig.of_run(file).model.template_date if file.is_file() else None


def changed_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by key.

    Raises: ConfigError if one of them would make it a different run.
    """
    changed = {
        key: (was, now)
        for key in keys()
        if key != "run.out" and (was := old.value(key)) != (now := new.value(key))
    }
    scheduled = new.learning.lr_schedule != "constant"
    free = [key for key in MAY_CHANGE if not (scheduled and key == "run.steps")]
    # Where overlong prompts are left out, the limit decides which rows are trained on.
    rising = () if new.task.filter_overlong_prompts else MAY_RISE
    wrong = {k: pair for k, pair in changed.items() if not _may_change(k, *pair, free, rising)}
    if wrong:
        told = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in wrong.items())
        raise ConfigError(
            f"A resumed run keeps its settings, but {told}. Leave them out, or start a new run. "
            f"Settings that may change: {', '.join(free)}; that may be raised: "
            f"{', '.join(MAY_RISE)}, unless task.filter_overlong_prompts leaves out rows by it."
        )
    return changed


def _may_change(
    key: str, was: Any, now: Any, free: Collection[str], rising: Collection[str]
) -> bool:
    return key in free or (key in rising and now > was) or (key in SINCE and was is None)
