"""The speed of earlier runs on this machine, by model, for telling how long the next one takes.

It is only shown: nothing that a run computes depends on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localrl import backend
from localrl.backend import mx
from localrl.config import RunConfig
from localrl.memory.sizes import Sizes, parameters
from localrl.records import MemoryPlan
from localrl.training.evaluating import FIRST, LARGE, LEAST, affordable
from localrl.training.forecast import Forecast
from localrl.training.memory_plan import shape_of
from localrl.utils import stored
from localrl.utils.cache import cache_folder

if TYPE_CHECKING:
    from localrl.training.session import Session

CUT = 0.9
"""Mean length, as a share of the longest allowed, from which on it says nothing of a longer one."""


@dataclass(frozen=True)
class Speed:
    """Seconds and lengths of a run."""

    step_token_s: float
    """Seconds of a step per token sampled in it."""
    evaluation_token_s: float
    """Seconds of an evaluation per token sampled in it; 0 if there was none."""
    completion_tokens: float
    """Mean sampled tokens per completion of a step."""
    max_completion_tokens: int

    def tokens(self, limit: int) -> float:
        """Expected mean length of completions that may have `limit` tokens."""
        if self.completion_tokens >= CUT * self.max_completion_tokens:
            return limit * self.completion_tokens / self.max_completion_tokens
        return min(self.completion_tokens, limit)


def key_of(sizes: Sizes, engine: str) -> str:
    """Key of a speed: the model's sizes, engine, device and processor."""
    shape = asdict(replace(sizes, stored_bytes=None))
    machine = [backend.describe().device, mx.device_info().get("architecture", ""), _processor()]
    text = json.dumps([shape, engine, machine])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recall(sizes: Sizes, engine: str, file: Path | None = None) -> Speed | None:
    """Return the speed of the last run of such a model here; None if there was none."""
    found = stored.recall(file or store(), key_of(sizes, engine))
    if found is None:
        return None
    try:
        possible = all(math.isfinite(value) and value >= 0 for value in found.values())
        speed = Speed(**found)
    except TypeError:  # a file of other fields, or of none that are numbers
        return None
    return speed if possible and speed.max_completion_tokens else None


def remember(session: Session, file: Path | None = None) -> None:
    """Store the speed of a run, if it made enough steps in this process and has no other ranks."""
    measured = session.forecast.measured()
    if session.ranks.size > 1 or measured is None or not measured[2]:
        return
    if session.demonstrations is not None:
        return  # it sampled nothing
    steps, seconds, tokens = measured
    shape = session.sampler.shape
    completions = session.config.rollout.prompts_per_step * shape.leaves * shape.rounds
    speed = Speed(
        step_token_s=seconds / tokens,
        evaluation_token_s=_evaluation_token_s(session),
        completion_tokens=tokens / steps / completions,
        max_completion_tokens=session.plan.max_completion_tokens,
    )
    # Without a place to store it, the next run says that no speed is known.
    stored.remember(
        file or store(), key_of(session.request.sizes, session.policy.engine.name), asdict(speed)
    )


def expected_s(config: RunConfig, plan: MemoryPlan, sizes: Sizes, speed: Speed) -> float:
    """Seconds that a run of these settings takes at this speed, evaluations included."""
    shape, length = shape_of(config, plan), speed.tokens(plan.max_completion_tokens)
    completions = config.rollout.prompts_per_step * shape.leaves * shape.rounds
    count = config.task.held_out
    each_s = length * (speed.evaluation_token_s or speed.step_token_s)
    work = parameters(sizes).total * count * plan.max_completion_tokens
    if config.task.eval_prompts is None and count > LEAST and work > LARGE:
        count = affordable(count, FIRST * each_s)
    forecast = Forecast.of(config, evaluates=count > 0)
    forecast.step_s = completions * length * speed.step_token_s
    forecast.evaluation_s = count * each_s
    return forecast.evaluation_s + (forecast.left_s(0, 0.0) or 0.0)


def store() -> Path:
    """Path of the file, in localrl's cache folder."""
    return cache_folder() / "speeds.json"


def _evaluation_token_s(session: Session) -> float:
    if not session.evaluations:
        return 0.0
    last = session.evaluations[max(session.evaluations)]
    tokens = len(last.passed) * (last.mean_completion_tokens or 0.0)
    return session.forecast.evaluation_s / tokens if tokens else 0.0


def _processor() -> list[str]:
    """Names of the processor, and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = sorted({line.partition(":")[2].strip() for line in lines if line.startswith("model n")})
    return [*(names or [platform.machine()]), str(os.cpu_count())]
