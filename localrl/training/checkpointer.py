"""Decides when checkpoints are written and which ones are kept."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Self

from localrl.backend import mx
from localrl.errors import CheckpointError
from localrl.memory.failures import doubtful, failure_of
from localrl.training.session import Session
from localrl.training.state import State, capture, restore, write

LEAST_S, COST = 2.0, 0.01
"""Minimum seconds between checkpoints, and the largest share of time spent writing them."""
MOST_FAILURES = 3
"""Consecutive failed checkpoint writes after which the run stops."""
MOST_REFUSALS = 5
"""Number of times a step is retried with smaller batches."""


class Checkpointer:
    """Keeps the state of a running session safe; use it as a context manager.

    On exit, by a stop request or an error, saves the state after the last completed step, unless
    the error means that GPU results may be corrupt.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._saved = not session.ranks.is_main or session.checkpoints.steps()[-1:] == [
            session.step
        ]
        begun = session.ranks.is_main and self._saved
        self._state: State | None = capture(session, session.step) if begun else None
        self._committed = (session.step, len(session.evaluations)) if begun else None
        self._cost_s = 0.0
        self._last = time.monotonic()
        self._failures = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        trusted = error is None or not (doubtful(error) or isinstance(error, CheckpointError))
        if trusted and not self._saved:
            self._save()

    def run_with_retry(self, work: Callable[[Session, int], object], step: int) -> None:
        """Run the work of a step; if an allocation is refused, retry with the same draws in smaller
        batches.

        Raises: whatever the work raises, including a refusal when nothing is left to give up.
        """
        # Ranks that stand at different points of a step cannot continue together: no retries.
        for _ in range(MOST_REFUSALS if self._session.ranks.size == 1 else 0):
            try:
                work(self._session, step)
                return
            except (MemoryError, RuntimeError) as error:
                if failure_of(error) != "refused" or not self._session.shrink_plan(
                    step, str(error)
                ):
                    raise
            # Outside the handler, because its error keeps the arrays of the failed attempt alive.
            self._rollback()
        work(self._session, step)

    def _rollback(self) -> None:
        """Restore the session to its state before the step, except for its plan."""
        assert self._state is not None
        restore(self._state, self._session)
        self._session.drop_logs()
        self._session.watch.calm = 0
        self._state = capture(self._session, self._state.step)
        gc.collect()
        mx.clear_cache()

    def commit(self, step: int) -> None:
        """Record that a step is done: keep its state, and write it if a checkpoint is due.

        Raises: CheckpointError if writing has failed several times in a row.
        """
        now = (step, len(self._session.evaluations))
        if now == self._committed or not self._session.ranks.is_main:
            return
        self._state, self._saved, self._committed = capture(self._session, step), False, now
        if self._due(step):
            self._save()

    def _due(self, step: int) -> bool:
        run = self._session.config.run
        if step in self._session.evaluations or step >= run.steps:
            return True
        if step == 0:  # the only thing to lose is the evaluation that comes next
            return not self._session.evaluates
        if run.keep_every and step % run.keep_every == 0:
            return True
        if run.checkpoint_every:
            return step % run.checkpoint_every == 0
        waited = time.monotonic() - self._last
        return waited >= max(LEAST_S, self._cost_s / COST)

    def _save(self) -> None:
        if self._state is None:
            return
        session, started = self._session, time.monotonic()
        try:
            session.run.sync()
            write(self._state, session.checkpoints)
            session.checkpoints.prune(self._kept())
            self._saved, self._failures = True, 0
        except CheckpointError as error:
            self._failures += 1
            session.run.event("checkpoint_failed", step=self._state.step, reason=str(error))
            if self._failures >= MOST_FAILURES:
                raise
            session.progress.warn(f"{error} The run continues.")
        self._last = time.monotonic()
        self._cost_s = self._last - started

    def _kept(self) -> set[int]:
        """Return the steps whose checkpoints are kept: the last two, the best, and every Nth."""
        every, steps = self._session.config.run.keep_every, self._session.checkpoints.steps()
        kept = {*steps[-2:], *(step for step in steps if every and step % every == 0)}
        shares = {
            step: evaluation.pass_at_1
            for step, evaluation in self._session.evaluations.items()
            if step in steps and evaluation.pass_at_1 is not None
        }
        return kept | ({max(shares, key=lambda step: shares[step])} if shares else set())
