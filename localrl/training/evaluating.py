"""The evaluations of a run: on all held-out prompts, or on as many as its speed allows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from localrl.config import RunConfig
from localrl.evaluate import Evaluation, at_temperature, judge, sampled_tokens, summarise
from localrl.memory.sizes import parameters
from localrl.records import ScoredGroup
from localrl.rollouts.pace import Pace
from localrl.training.demonstrations import Demonstrations
from localrl.training.forecast import informative_share, time_gradient

if TYPE_CHECKING:
    from localrl.training.session import Session

FIRST = 32
"""Number of prompts evaluated and timed before the rest, if the model is large."""
LARGE = 1e12
"""Weights times tokens from which on an evaluation is timed first; below, it takes seconds."""
MOST_S = 240.0
"""Seconds that an evaluation may take if `task.eval_prompts` is not set."""
LEAST = 64
"""Fewest prompts it is reduced to."""


@dataclass(eq=False)
class Judging:
    """Judged completions, and what they took."""

    scored: list[ScoredGroup]
    pace: Pace
    seconds: float
    score_s: float
    """Seconds in reward functions."""


def evaluate(session: Session, step: int) -> Evaluation:
    """Evaluate the present adapters; the base evaluation also sets the forecast."""
    started = time.perf_counter()
    loss, examples = _held_out_loss(session)
    loss_s = time.perf_counter() - started
    judging = _judge(session, may_reduce=step == 0)
    session.drop_logs()  # logs of held-out completions do not belong to a step
    session.forecast.evaluation_s = judging.seconds + loss_s
    # Later a timed gradient would change what the next step is computed from: by rounding, since
    # adapters prepared for decoding would be prepared anew.
    if step == 0 and session.config.run.steps:
        session.forecast.step_s = _expected_step_s(session, judging)
    rewards = session.task.rewards
    found = summarise(
        judging.scored,
        passing=rewards[0].name if rewards else "",
        temperature=session.config.eval_temperature,
    )
    return replace(found, loss=loss, demonstrations=examples)


def _held_out_loss(session: Session) -> tuple[float | None, int]:
    """Return the mean -log-probability per token of held-out worked examples, and their number."""
    given, updater = session.demonstrations, session.updater
    if given is None or not given.held_out:
        return None, 0
    groups = [scored.group for scored in given.groups(given.held_out, updater.updates)]
    found = session.sampler.rescore(groups, session.plan)
    total = -sum(float(np.sum(values, dtype=np.float64)) for [values] in found)
    tokens = sum(int(group.nodes[0].sampled.sum()) for group in groups)
    return total / tokens, len(groups)


def _judge(session: Session, *, may_reduce: bool) -> Judging:
    """Judge one completion of each held-out prompt, or, if that would take long, of fewer."""
    held_out, config = session.held_out, session.config
    decoder = at_temperature(session.decoder, config.eval_temperature)
    judging = Judging([], decoder.pace, 0.0, 0.0)

    def add(first: int, last: int) -> None:
        examples = held_out[first:last]
        started, before = time.perf_counter(), session.scorer.busy_s
        judging.scored += judge(
            decoder,
            examples,
            session.sampler.encode(examples),
            session.scorer.score,
            max_completion_tokens=session.plan.max_completion_tokens,
            turns=session.sampler.turns,
        )
        judging.seconds += time.perf_counter() - started
        judging.score_s += session.scorer.busy_s - before

    count = len(held_out)
    if not count:
        return judging
    work = parameters(session.request.sizes).total * count * session.plan.max_completion_tokens
    if may_reduce and config.task.eval_prompts is None and count > LEAST and work > LARGE:
        add(0, FIRST)
        count = affordable(count, judging.seconds)
        if count < len(held_out):
            session.reduce_evaluations(count, judging.seconds / FIRST)
    add(len(judging.scored), count)
    return judging


def affordable(count: int, seconds: float) -> int:
    """Number of prompts to evaluate, of `count`, if the first `FIRST` took these seconds."""
    most = FIRST * math.floor(MOST_S / max(seconds, 1e-9))
    return min(count, max(LEAST, most))


def _expected_step_s(session: Session, judging: Judging) -> float:
    """Seconds of a step, from the evaluation's pace and completions, and from one gradient."""
    config, shape, plan = session.config, session.sampler.shape, session.plan
    if session.demonstrations is not None:
        return _supervised_step_s(session, session.demonstrations)
    prompts, groups = config.rollout.prompts_per_step, [one.group for one in judging.scored]
    completions = prompts * shape.leaves * shape.rounds
    lengths = [sampled_tokens(one) for one in judging.scored]
    means = [sum(len(group.prompt_ids) for group in groups), sum(lengths)]
    sampling_s = judging.pace.expected_s(prompts, lengths, completions, plan.decode_rows)
    update_s = 0.0
    if session.ranks.size == 1:
        update_s = time_gradient(
            session.updater.gradient,
            plan,
            paths=completions,
            lengths=[total // len(groups) for total in means],
            vocabulary=session.request.sizes.vocabulary,
        )
    updates = config.learning.updates_per_step * _trained_share(config, judging.scored)
    return sampling_s + completions * (judging.score_s / len(groups) + updates * update_s)


def _supervised_step_s(session: Session, given: Demonstrations) -> float:
    """Seconds of a step that samples nothing, from one gradient."""
    if session.ranks.size > 1:
        return 0.0
    paths = session.config.rollout.prompts_per_step
    each_s = time_gradient(
        session.updater.gradient,
        session.plan,
        paths=paths,
        lengths=[round(length) for length in given.mean],
        vocabulary=session.request.sizes.vocabulary,
    )
    return paths * session.config.learning.updates_per_step * each_s


def _trained_share(config: RunConfig, judged: Sequence[ScoredGroup]) -> float:
    """Expected share of a step's completions that have a gradient; all have one with a KL."""
    if config.learning.kl_coef:
        return 1.0
    rewards = [reward for one in judged if (reward := one.rewards[0]) is not None]
    tracked = config.tracker_weight > 0
    return informative_share(rewards, config.rollout.completions, tracked=tracked)
