"""The loop, in reading order.

Task -> rollouts -> rewards -> credit -> selection -> update -> run folder
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.config import RunConfig
from localrl.evaluate import Evaluation
from localrl.learning.objectives import denominator
from localrl.learning.selection import select
from localrl.rollouts.groups import sample_groups
from localrl.runs.metrics import rollout_metrics, update_metrics
from localrl.session import Progress, Session, Silent, open_session
from localrl.tasks.order import take


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    steps: int
    train_s: float
    """Seconds of the training loop, without the evaluations before and after it."""
    base: Evaluation | None
    adapter: Evaluation | None


def train(
    config: RunConfig, *, overwrite: bool = False, progress: Progress | None = None
) -> RunResult:
    """Teach the configured model the configured task; everything lands in the run folder.

    Raises: ConfigError, before anything is computed, when the configuration cannot work;
    RewardError when rewards fail too often; LocalRLError when the adapter diverges.
    """
    with open_session(config, overwrite=overwrite, progress=progress or Silent()) as session:
        base = session.evaluate(0)
        started, step = time.monotonic(), 0
        while step < config.run.steps and not _time_is_up(config, started):
            step += 1
            train_step(session, step)
            if _evaluation_due(config, step):
                session.evaluate(step)
        train_s = time.monotonic() - started
        session.save_adapter()
        adapter = session.evaluate(step)
        session.finish(base, adapter)
    return RunResult(session.folder, step, train_s, base, adapter)


def train_step(session: Session, step: int) -> None:
    """One turn of the loop."""
    config, plan, clock = session.config, session.plan, Stopwatch()
    learning_rate, decoded = session.updater.learning_rate, session.decoder.counts.snapshot()

    first = (step - 1) * config.rollout.prompts_per_step
    examples = take(session.task, first, config.rollout.prompts_per_step, config.run.seed)
    groups = sample_groups(
        session.decoder,
        examples,
        session.encode(examples),
        roots=session.roots,
        group_size=plan.group_size,
        rule=session.rule,
        max_completion_tokens=plan.max_completion_tokens,
        seed=config.run.seed,
        step=step,
        version=session.updater.updates,
    )
    clock.lap("time/rollout_s")
    scored = session.scorer.score(groups)
    clock.lap("time/reward_s")
    credits = [session.credit(group) for group in scored]
    objective = session.updater.objective
    z = denominator(objective, scored, credits, config.rollout.max_completion_tokens)
    selection = select(scored, credits, z, objective)
    stats = session.updater.update(selection.batch, plan)
    clock.lap("time/update_s")
    session.learn(scored, credits)

    session.log_step(
        step,
        scored,
        credits,
        selection,
        {
            "epoch": first / session.task.train_size if session.task.train_size else None,
            "learning_rate": learning_rate,
            **rollout_metrics(scored),
            **update_metrics(stats),
            **session.decoder.counts.since(decoded),
            **clock.laps,
            "step_time": clock.total(),
        },
    )


class Stopwatch:
    """Seconds of the parts of a step, under the names of their metrics."""

    def __init__(self) -> None:
        self.laps: dict[str, Any] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Give the time since the last lap this name."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started


def _time_is_up(config: RunConfig, started: float) -> bool:
    limit = config.run.minutes
    return limit is not None and time.monotonic() - started >= 60 * limit


def _evaluation_due(config: RunConfig, step: int) -> bool:
    """Every eval_every steps; after the last step the closing evaluation does it."""
    every = config.run.eval_every
    return every > 0 and step % every == 0 and step < config.run.steps
