"""When checkpoints are written, and which of them stay."""

from __future__ import annotations

import time
from typing import Self

from localrl.errors import CheckpointError
from localrl.resuming import State, take, write
from localrl.session import Session

LEAST_S, COST = 2.0, 0.01
"""Seconds between checkpoints at least, and the share of the time that writing them may take."""
MOST_FAILURES = 3
"""Checkpoints in a row that may fail to be written before the run stops."""


class Keeper:
    """Keeps the state of a running session safe; use it as a context manager.

    What is stopped within it, by a request or an error, is saved as it was after its last step.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._state: State | None = None
        self._saved = session.checkpoints.steps()[-1:] == [session.step]
        self._marked = (session.step, len(session.evaluations)) if self._saved else None
        self._cost_s = 0.0
        self._last = time.monotonic()
        self._failures = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._saved and (kind is None or not issubclass(kind, CheckpointError)):
            self._save()

    def mark(self, step: int) -> None:
        """This step is done. Its state is kept, and written when that is due.

        Raises: CheckpointError when it could not be written several times in a row.
        """
        now = (step, len(self._session.evaluations))
        if now == self._marked:
            return
        self._state, self._saved, self._marked = take(self._session, step), False, now
        if self._due(step):
            self._save()

    def _due(self, step: int) -> bool:
        run = self._session.config.run
        if step in self._session.evaluations or step >= run.steps:
            return True
        if step == 0:  # what there is to lose is the evaluation that comes now
            return not self._session.held_out
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
            session.progress.warn(f"{error} The run goes on.")
        self._last = time.monotonic()
        self._cost_s = self._last - started

    def _kept(self) -> set[int]:
        """The steps whose checkpoints stay: the last two, the best, and every Nth."""
        every, steps = self._session.config.run.keep_every, self._session.checkpoints.steps()
        kept = {*steps[-2:], *(step for step in steps if every and step % every == 0)}
        shares = {
            step: evaluation.pass_at_1
            for step, evaluation in self._session.evaluations.items()
            if step in steps and evaluation.pass_at_1 is not None
        }
        return kept | ({max(shares, key=lambda step: shares[step])} if shares else set())
