"""Where the time of one training step goes, stage by stage.

MLX computes when it is asked for a value, so that stages run into each other. Here each is made to
finish by itself; what that costs, and what they save together, is in the stage "other", which can
be below 0.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from localrl.backend import mx, optim, tree_map
from localrl.bench import (
    Opened,
    decode_once,
    make_batch,
    micro_batches,
    sample,
    score_in_turn,
    seconds,
)
from localrl.learning.update import global_norm
from localrl.policy.array_scoring import ChunkedHead
from localrl.policy.model import Logits, Policy
from localrl.policy.packing import MicroBatch
from localrl.policy.scoring import head_logprobs, token_logprobs
from localrl.records import Batch, Group
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.scoring import Scorer
from localrl.rollouts.batch import take
from localrl.rollouts.decode import Decoder, draw
from localrl.runs.logs import GroupRecord, JsonLines, rollout_line
from localrl.runs.metrics import rollout_metrics
from localrl.worker import Worker

WORKER_S, WORKER_BYTES = 30.0, 2**31


@dataclass(frozen=True)
class Stage:
    """A part of a step."""

    name: str
    seconds: float
    calls: int
    """How often it is done in a step."""


@dataclass(frozen=True)
class Profile:
    """A step of one group, and its stages; they add up to it."""

    step_s: float
    stages: tuple[Stage, ...]


def profile(opened: Opened) -> Profile:
    """One step: rollout, rewards, credit, update, logs. Medians of repeats."""
    with _scorer(opened) as scorer, tempfile.TemporaryDirectory() as folder:
        log = JsonLines(Path(folder) / "rollouts.jsonl")
        try:
            _step(opened, scorer, log)  # warms up
            step_s = _median(opened, lambda: seconds(lambda: _step(opened, scorer, log)))
            stages = [*_rollout(opened, scorer), *_update(opened), _logging(opened, log)]
        finally:
            log.close()
    rest = step_s - sum(stage.seconds for stage in stages)
    return Profile(step_s, (*stages, Stage("other", rest, 1)))


@contextmanager
def _scorer(opened: Opened) -> Iterator[Scorer]:
    reward = f"length(best=1, worst={opened.wanted.tokens + 1})"
    with Worker(time_limit_s=WORKER_S, memory_limit_bytes=WORKER_BYTES) as worker:
        yield Scorer(parse_rewards([reward], None), worker)


def _step(opened: Opened, scorer: Scorer, log: JsonLines) -> None:
    groups = sample(opened, opened.endless)
    scorer.score(groups)
    opened.updater.update(make_batch(opened, groups).batch, opened.plan)
    _write(opened, groups, log)


def _rollout(opened: Opened, scorer: Scorer) -> list[Stage]:
    group, tokens = opened.plan.group_size, opened.wanted.tokens
    decoder = Decoder(opened.endless, 1.0, group)
    prefill_s = _median(opened, lambda: seconds(lambda: decoder.prefill([opened.prompt])))
    build_s, compute_s, whole_s = np.median(
        [_decode(opened) for _ in range(opened.wanted.repeats)], axis=0
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
    """Seconds of building the graphs of all decode calls, of computing them, and of all."""
    watched = _Watched(opened.endless)
    whole_s = float(decode_once(opened, opened.plan.group_size, cast(Policy, watched)).sum())
    return watched.build_s, watched.compute_s, whole_s


class _Watched:
    """A policy whose decode calls are timed, and made to finish."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.build_s = self.compute_s = 0.0

    def step(self, tokens: np.ndarray, cache: Sequence[Any]) -> Logits:
        start = time.perf_counter()
        logits = self._policy.step(tokens, cache)
        built = time.perf_counter()
        if isinstance(logits, np.ndarray):  # computed at once, without a graph
            self.compute_s += built - start
            return logits
        mx.eval(logits, [layer.state for layer in cache])
        self.build_s += built - start
        self.compute_s += time.perf_counter() - built
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def _draw_s(opened: Opened) -> float:
    """Seconds of drawing one token for every row."""
    _, logits = Decoder(opened.endless, 1.0, 1).prefill([opened.prompt])
    logits = take(logits, np.zeros(opened.plan.group_size, int))
    coins = np.random.default_rng(0).random(len(logits), np.float32)
    times = [seconds(lambda: mx.eval(*draw(logits, coins, 1.0))) for _ in range(20)]
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
        mx.eval(
            token_logprobs(opened.policy, micro, temperature=1.0, head_chunk=opened.plan.head_chunk)
        )


def _head_s(opened: Opened, micros: list[MicroBatch]) -> float:
    """Seconds of the head's forward; 0 where it cannot be told from the body."""
    policy, chunk = opened.policy, opened.plan.head_chunk
    head, hidden = policy.head, policy.hidden
    if head is None or hidden is None:
        return 0.0
    width = hidden(mx.array([[1]])).shape[-1]
    work = [(mx.random.normal((len(micro.sources), width)), micro.targets) for micro in micros]
    mx.eval([states for states, _ in work])

    weights = policy.arrays.read() if policy.arrays is not None else None

    def score() -> None:
        for states, targets in work:
            if weights is not None:
                ChunkedHead(weights, targets, 1.0, chunk).logprobs(np.array(states).T)
            else:
                mx.eval(head_logprobs(head, states, mx.array(targets), 1.0, chunk))

    return seconds(score)


def _optimizer_s(opened: Opened, batch: Batch) -> float:
    """Seconds of the norm and of one step of Adam, on copies: the adapters stay."""
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
    """What a run writes of a step: a line of metrics, and one for each group."""
    scored, credits = score_in_turn(groups)
    log.append({"step": 1, **rollout_metrics(scored)})
    for group, credit in zip(scored, credits, strict=True):
        pieces = [
            opened.policy.tokenizer.pieces(node.token_ids.tolist()) for node in group.group.nodes
        ]
        kept = [None] * len(group.rewards)
        log.append(rollout_line(1, GroupRecord(group, credit.advantages, kept, pieces=pieces)))


def _median(opened: Opened, work: Callable[[], float]) -> float:
    return median(work() for _ in range(opened.wanted.repeats))
