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
from localrl.opening import open_session
from localrl.runs.metrics import rollout_metrics, selection_metrics, update_metrics
from localrl.session import Progress, Session, Silent


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
    sampler, updater, clock = session.sampler, session.updater, Stopwatch()
    before, learning_rate = session.counters(), updater.learning_rate
    version = updater.updates
    session.tell_rewards(step)

    examples = sampler.choose(step)
    fresh = sampler.collect(step, examples, version)
    scored = fresh + sampler.replay(step, fresh, version)
    clock.lap("time/rollout_s")
    credits = [session.credit(step, group) for group in scored]
    selection = session.select(step, scored, credits)
    stats = updater.update(selection.batch, session.plan)
    clock.lap("time/update_s")
    session.learn(fresh, credits, stats, version)

    session.log_step(
        step,
        scored,
        credits,
        selection,
        {
            "epoch": session.epoch(step),
            "learning_rate": learning_rate,
            **rollout_metrics(fresh),
            **selection_metrics(
                fresh, scored[len(fresh) :], selection.dropped, selection.trained_tokens
            ),
            **update_metrics(stats),
            **{name: count - before[name] for name, count in session.counters().items()},
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
