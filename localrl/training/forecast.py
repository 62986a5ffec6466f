"""The duration of a run: expected from its base evaluation, then from the steps it has made."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from localrl.config import RunConfig
from localrl.learning.gradient import GradientPass
from localrl.records import MemoryPlan
from localrl.runs.schedule import evaluations_after
from localrl.training.calibrate import probe_batch

RECENT = 20
"""Number of steps whose mean duration stands for those to come."""
ENOUGH = 3
"""Number of steps after which the first one, which also warms up, no longer counts."""
WARM = 4
"""Tokens of the completions whose gradient is computed before one is timed."""
TIMED_ROWS = 8
"""Most completions in the gradient that is timed."""


@dataclass(eq=False)
class Forecast:
    """Seconds that the rest of a run takes."""

    steps: int
    eval_every: int
    limit_s: float | None
    """Seconds of steps after which the run ends early."""
    evaluates: bool
    step_s: float | None = None
    """Expected seconds of a step: from the base evaluation, later from steps."""
    evaluation_s: float = 0.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT + 1))
    _tokens: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT + 1))

    @classmethod
    def of(cls, config: RunConfig, *, evaluates: bool) -> Forecast:
        """Return the forecast of a configured run, which knows no durations yet."""
        run = config.run
        limit_s = None if run.minutes is None else 60 * run.minutes
        return cls(run.steps, run.eval_every, limit_s, evaluates)

    def stepped(self, seconds: float, tokens: int = 0) -> None:
        """Add the duration of a step, and the tokens sampled in it."""
        self._recent.append(seconds)
        self._tokens.append(tokens)
        known = list(self._recent)
        known = known[1:] if len(known) >= ENOUGH else known
        self.step_s = sum(known) / len(known)

    def measured(self) -> tuple[int, float, int] | None:
        """Number, seconds and tokens of recent steps; None before `ENOUGH`: the first warms up."""
        if len(self._recent) < ENOUGH:
            return None
        return len(self._recent) - 1, sum(list(self._recent)[1:]), sum(list(self._tokens)[1:])

    def evaluations_left(self, step: int) -> int:
        """Number of evaluations that come after this step's."""
        return evaluations_after(step, self.steps, self.eval_every) if self.evaluates else 0

    def left_s(self, step: int, trained_s: float) -> float | None:
        """Seconds from the end of this step to the end of the run; None if nothing is known yet.

        trained_s: seconds of all steps so far.
        """
        if self.step_s is None:
            return None
        training = self.step_s * (self.steps - step)
        if self.limit_s is not None:
            training = min(training, max(0.0, self.limit_s - trained_s))
        return training + self.evaluation_s * self.evaluations_left(step)


def informative_share(rewards: Sequence[float], group: int, *, tracked: bool) -> float:
    """Expected share of the completions that a step trains, from rewards of single completions.

    tracked: a completion is also compared with other prompts' rewards; otherwise only with the
    others of its group of this size, which teach nothing if all are equal.
    """
    counts = Counter(rewards).values()
    if len(counts) < 2 or tracked:
        return float(len(counts) > 1)
    return 1 - sum((count / len(rewards)) ** group for count in counts)


def time_gradient(
    gradient: GradientPass,
    plan: MemoryPlan,
    *,
    paths: int,
    lengths: Sequence[int],
    vocabulary: int,
) -> float:
    """Seconds of the gradient of one completion, timed on a micro-batch.

    paths: completions of a step. lengths: mean tokens of prompts and completions. Rows are timed,
    with the part of a prompt that each of its completions costs in a forest: how the family is
    scored is only decided on the first real batch. The adapters stay as they are.
    """
    prompt, tokens = (max(1, length) for length in lengths)
    rows = min(paths, plan.micro_rows, TIMED_ROWS)
    part = -(-prompt // plan.group_size)
    shape = replace(plan, max_prompt_tokens=part, max_completion_tokens=tokens)
    shared, gradient.shared = gradient.shared, False
    try:
        warm = replace(shape, max_completion_tokens=min(WARM, tokens))
        gradient(probe_batch(plan.group_size, warm, vocabulary), plan)
        batch = probe_batch(rows, shape, vocabulary)
        started = time.perf_counter()
        gradient(batch, plan)
        return (time.perf_counter() - started) / rows
    finally:
        gradient.shared = shared
