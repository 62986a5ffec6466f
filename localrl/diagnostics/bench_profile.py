"""Profiles one training step, stage by stage.

MLX computes lazily, so stages overlap. Here each one is forced to finish by itself; the cost of
that, and the time that overlapping saves, are in the stage "other", which can be below 0.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from localrl.backend import mx, optim, tree_map
from localrl.diagnostics.bench import (
    Opened,
    decode_once,
    make_batch,
    micro_batches,
    sample,
    score_in_turn,
    seconds,
)
from localrl.learning.update import global_norm
from localrl.policy.engine import Engine
from localrl.policy.packing import MicroBatch
from localrl.processes.worker import Worker
from localrl.records import Batch, Group
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.scoring import Scorer
from localrl.rollouts.decode import Decoder
from localrl.runs.logs import GroupRecord, JsonLines, rollout_line
from localrl.runs.metrics import rollout_metrics

WORKER_S, WORKER_BYTES = 30.0, 2**31


@dataclass(frozen=True)
class Stage:
    """A part of a step."""

    name: str
    seconds: float
    calls: int
    """Number of times it is done in a step."""


@dataclass(frozen=True)
class Profile:
    """A step of one group, and its stages, which add up to it."""

    step_s: float
    stages: tuple[Stage, ...]


def profile(opened: Opened) -> Profile:
    """Profile one step: rollout, rewards, credit, update, logs. Medians of repeats."""
    with stepping(opened) as (scorer, log):

        def step() -> None:
            finish(opened, sample(opened, opened.endless), scorer, log)

        step()  # warms up
        step_s = _median(opened, lambda: seconds(step))
        stages = [*_rollout(opened, scorer), *_update(opened), _logging(opened, log)]
    rest = step_s - sum(stage.seconds for stage in stages)
    return Profile(step_s, (*stages, Stage("other", rest, 1)))


@contextmanager
def stepping(opened: Opened) -> Iterator[tuple[Scorer, JsonLines]]:
    """Open what a step needs besides the model: a reward, and a log that is deleted afterwards."""
    reward = f"length(best=1, worst={opened.request.tokens + 1})"
    with ExitStack() as stack:
        worker = Worker(time_limit_s=WORKER_S, memory_limit_bytes=WORKER_BYTES)
        scorer = Scorer(parse_rewards([reward], None), stack.enter_context(worker))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        log = JsonLines(Path(folder) / "rollouts.jsonl")
        stack.callback(log.close)
        yield scorer, log


def finish(opened: Opened, groups: list[Group], scorer: Scorer, log: JsonLines) -> None:
    """Do what a step does after sampling: rewards, credit, update, logs."""
    scorer.score(groups)
    opened.updater.update(make_batch(opened, groups).batch, opened.plan)
    _write(opened, groups, log)


def _rollout(opened: Opened, scorer: Scorer) -> list[Stage]:
    group, tokens = opened.plan.group_size, opened.request.tokens
    decoder = Decoder(opened.endless, 1.0, group)
    prefill_s = _median(opened, lambda: seconds(lambda: decoder.prefill([opened.prompt])))
    build_s, compute_s, whole_s = np.median(
        [_decode(opened) for _ in range(opened.request.repeats)], axis=0
    )
    draw_s = tokens * _draw_s(opened)
    groups = sample(opened, opened.endless)
    return [
        Stage("prefill", prefill_s, 1),
        Stage("decode: building the graph", build_s, tokens - 1),
        Stage("decode: forward", compute_s, tokens - 1),
        Stage("decode: sampling", draw_s, tokens),
        Stage("decode: bookkeeping", whole_s - prefill_s - build_s - compute_s - draw_s, tokens),
        Stage("rewards", _median(opened, lambda: seconds(lambda: scorer.score(groups))), 1),
        Stage("credit and selection", _median(opened, lambda: _credit_s(opened, groups)), 1),
    ]


def _decode(opened: Opened) -> tuple[float, float, float]:
    """Return seconds of building the graphs of all decode calls, of computing them, and in
    total."""
    times = _Times()
    engine = cast(Engine, _Watched(opened.endless.engine, times))
    whole_s = float(
        decode_once(opened, opened.plan.group_size, replace(opened.endless, engine=engine)).sum()
    )
    if opened.endless.engine.name == "cpu":  # computes at once, without a graph
        return 0.0, times.begin_s + times.wait_s, whole_s
    return times.begin_s, times.wait_s, whole_s


@dataclass
class _Times:
    begin_s: float = 0.0
    wait_s: float = 0.0


class _Watched:
    """An engine, its prefilled prompts, or rows whose steps are timed and forced to finish."""

    looks_ahead = False
    """Steps are timed one by one."""

    def __init__(self, inner: Any, times: _Times) -> None:
        self._inner, self._times = inner, times

    def prefill(self, *args: Any) -> _Watched:
        return _Watched(self._inner.prefill(*args), self._times)

    def fork(self, *args: Any) -> _Watched:
        return _Watched(self._inner.fork(*args), self._times)

    def step(self, tokens: np.ndarray) -> None:
        start = time.perf_counter()
        self._inner.step(tokens)
        begun = time.perf_counter()
        self._inner.wait()
        self._times.begin_s += begun - start
        self._times.wait_s += time.perf_counter() - begun

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _draw_s(opened: Opened) -> float:
    """Return the seconds of drawing one token for every row."""
    prefilled = Decoder(opened.endless, 1.0, 1).prefill([opened.prompt])
    state = prefilled.fork(np.zeros(opened.plan.group_size, int), None)
    coins = np.random.default_rng(0).random(len(state), np.float32)
    times = [seconds(lambda: state.sample(coins, 1.0)) for _ in range(20)]
    return median(times)


def _credit_s(opened: Opened, groups: list[Group]) -> float:
    return seconds(lambda: make_batch(opened, groups))


def _update(opened: Opened) -> list[Stage]:
    updater, plan = opened.updater, opened.plan
    batch = make_batch(opened, sample(opened, opened.endless)).batch
    micros = micro_batches(opened, batch)
    pack_s = _median(opened, lambda: seconds(lambda: micro_batches(opened, batch)))
    forward_s = _median(opened, lambda: seconds(lambda: _forward(opened, micros)))
    head_s = _median(opened, lambda: _head_s(opened, micros))
    gradient_s = _median(opened, lambda: seconds(lambda: updater.gradient(batch, plan)))
    whole_s = _median(opened, lambda: seconds(lambda: updater.update(batch, plan)))
    optimizer_s = _optimizer_s(opened, batch)
    passes = len(micros)
    return [
        Stage("update: packing", pack_s, 1),
        Stage("update: forward", forward_s - head_s, passes),
        Stage("update: head", head_s, passes),
        Stage("update: backward", gradient_s - pack_s - forward_s, passes),
        Stage("update: optimizer", optimizer_s, 1),
        Stage("update: drift and checks", whole_s - gradient_s - optimizer_s, 1),
    ]


def _forward(opened: Opened, micros: list[MicroBatch]) -> None:
    for micro in micros:
        chunk = opened.plan.head_chunk
        mx.eval(opened.policy.engine.token_logprobs(micro, temperature=1.0, head_chunk=chunk))


def _head_s(opened: Opened, micros: list[MicroBatch]) -> float:
    """Return the seconds of the head's forward pass; 0 if it cannot be separated from the body."""
    engine, chunk = opened.policy.engine, opened.plan.head_chunk
    if not engine.splits_head:
        return 0.0
    draws = np.random.default_rng(0)
    work = [
        (draws.standard_normal((len(m.sources), opened.width), np.float32), m.targets)
        for m in micros
    ]

    def score() -> None:
        for states, targets in work:
            engine.head_logprobs(states, targets, temperature=1.0, chunk=chunk)

    return seconds(score)


def _optimizer_s(opened: Opened, batch: Batch) -> float:
    """Return seconds of the norm and one step of Adam, on copies: the adapters do not change."""
    model = opened.policy.model
    gradient, _ = opened.updater.gradient(batch, opened.plan)
    adapters = model.trainable_parameters()
    adam = optim.Adam(learning_rate=1e-9, bias_correction=True)

    def turn() -> None:
        factor = 1 / (global_norm(gradient) + 1)
        scaled = tree_map(lambda g: g * factor, gradient)
        mx.eval(adam.apply_gradients(scaled, adapters), adam.state)

    turn()
    return _median(opened, lambda: seconds(turn))


def _logging(opened: Opened, log: JsonLines) -> Stage:
    groups = sample(opened, opened.endless)
    return Stage("logs", _median(opened, lambda: seconds(lambda: _write(opened, groups, log))), 1)


def _write(opened: Opened, groups: list[Group], log: JsonLines) -> None:
    """Write what a run writes for a step: a line of metrics, and one for each group."""
    scored, credits = score_in_turn(groups)
    log.append({"step": 1, **rollout_metrics(scored)})
    for group, credit in zip(scored, credits, strict=True):
        pieces = [
            opened.policy.tokenizer.pieces(node.token_ids.tolist()) for node in group.group.nodes
        ]
        kept = [None] * len(group.rewards)
        log.append(rollout_line(1, GroupRecord(group, credit.advantages, kept, pieces=pieces)))


def _median(opened: Opened, work: Callable[[], float]) -> float:
    return median(work() for _ in range(opened.request.repeats))
