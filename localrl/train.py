"""The training loop, in reading order.

Task -> rollouts -> rewards -> credit -> selection -> update -> run folder
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from localrl.config import RunConfig
from localrl.display.console import Console
from localrl.distributed.collective import ALONE, Ranks
from localrl.distributed.gather import gather
from localrl.errors import LocalRLError, Stopped
from localrl.processes.child import Restart
from localrl.processes.heartbeat import Heartbeat
from localrl.runs.metrics import rollout_metrics, selection_metrics, update_metrics
from localrl.runs.schedule import evaluation_due
from localrl.training.checkpointer import Checkpointer
from localrl.training.given import Reward, hand_over
from localrl.training.result import RunResult
from localrl.training.session import NullProgress, Progress, Session
from localrl.training.setup import open_session


def train(
    config: RunConfig,
    *,
    data: Iterable[Mapping[str, Any]] | None = None,
    rewards: Reward | Sequence[Reward] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | Literal[False] | None = None,
    heartbeat: Heartbeat | None = None,
    restart: Restart | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train the configured model on the configured task; all output goes to the run folder.

    data: rows to train on, in place of `task.name`. rewards: functions, or texts that name them, in
    place of `task.rewards`; functions run in this process, without limits, see docs/python.md.
    resume: continue the run in `config.run.out` as if it had not been interrupted.
    progress: shows the run; None: on stderr, as a bar on a terminal or in a notebook; False: not.
    restart: the supervisor's record of the previous process.
    ranks: the ranks training together, see `collective.join`; only rank 0 has a run folder.

    Raises: ConfigError, before anything is computed, if the configuration cannot work;
    RewardError if rewards fail too often; LocalRLError if the adapter diverges; CheckpointError
    if there is no intact checkpoint to resume from; Stopped if `heartbeat` was asked to stop.
    """
    if progress is None:
        progress = Console()
    config, given = hand_over(config, data, rewards)
    opened = open_session(
        config,
        overwrite=overwrite,
        resume=resume,
        progress=progress or NullProgress(),
        heartbeat=heartbeat or Heartbeat(),
        restart=restart,
        ranks=ranks,
        given=given,
    )
    with opened as session, _explain_exit(session), Checkpointer(session) as checkpointer:
        step = session.step
        while True:
            checkpointer.commit(step)
            if evaluation_due(step, config.run.steps, config.run.eval_every):
                checkpointer.run_with_retry(Session.evaluate, step)
                checkpointer.commit(step)
            if step >= config.run.steps or _time_is_up(session):
                break
            step += 1
            checkpointer.run_with_retry(train_step, step)
            session.revise_plan(step)
        session.save_adapter()
        checkpointer.run_with_retry(Session.evaluate, step)
        base, adapter = session.evaluate(0), session.evaluate(step)
        checkpointer.commit(step)
        session.finish(base, adapter)
    return RunResult(
        session.folder, step, session.trained_s, base, adapter, session.plan, session.peak_bytes
    )


def train_step(session: Session, step: int) -> None:
    """Run one iteration of the loop."""
    sampler, updater, clock = session.sampler, session.updater, Stopwatch()
    before, learning_rate = session.counters(), updater.learning_rate
    version, sampled = updater.updates, session.tokens
    session.tell_rewards(step)

    examples = sampler.choose(step)
    session.make_room(step, examples)
    scored = sampler.collect(step, examples, version)
    clock.lap("time/rollout_s")
    credits = [session.credit(step, group) for group in scored]
    selection = session.select(step, scored, credits)
    stats = updater.update(selection.batch, session.plan)
    if stats.problem:
        session.run.event("update_skipped", step=step, reason=stats.problem)
    clock.lap("time/update_s")
    session.learn(scored, credits, stats)

    session.log_step(
        step,
        scored,
        credits,
        selection,
        {
            "epoch": session.epoch(step),
            "learning_rate": learning_rate,
            **rollout_metrics(scored),
            **selection_metrics(scored, selection.dropped, selection.trained_tokens),
            **update_metrics(stats),
            **{name: count - before[name] for name, count in session.counters().items()},
            **clock.laps,
            "step_time": clock.total(),
        },
    )
    session.trained_s += clock.total()
    session.forecast.stepped(clock.total(), session.tokens - sampled)


@contextmanager
def _explain_exit(session: Session) -> Iterator[None]:
    """Log why the run ended; if it was stopped and saved, say how to resume it."""
    try:
        yield
    except Stopped as stopped:
        if not session.ranks.is_main:
            raise Stopped(f"Rank {session.ranks.rank} was stopped by {stopped}.") from None
        steps = session.checkpoints.steps()
        done = f"and saved after step {steps[-1]}" if steps else "before anything was saved"
        session.run.event("stopped", reason=str(stopped))
        again = "" if session.ranks.size == 1 else " (with any number of ranks)"
        raise Stopped(
            f"Stopped by {stopped}, {done}. Resume with: localrl train --resume --out "
            f"{shlex.quote(str(session.folder))}{again}"
        ) from None
    except LocalRLError as error:
        session.run.event("failed", reason=str(error))
        raise


class Stopwatch:
    """Times the parts of a step, in seconds, by metric name."""

    def __init__(self) -> None:
        self.laps: dict[str, Any] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Record the time since the last lap under this name."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._started


def _time_is_up(session: Session) -> bool:
    limit = session.config.run.minutes
    if limit is None:
        return False
    # Only rank 0's time counts: that of other ranks includes waiting for evaluations.
    return gather(session.ranks, session.trained_s)[0] >= 60 * limit
