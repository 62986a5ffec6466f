"""Measures how fast this machine decodes and trains a model, for `localrl bench`.

Everything runs through the decoder and updater of a run, with meaningless prompts and rewards.
Completions have no end token here, so that every row is decoded to the last token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from localrl import backend
from localrl.backend import mx
from localrl.config import RunConfig
from localrl.diagnostics.bench_fit import fit
from localrl.diagnostics.bench_floor import measure_rates, needed
from localrl.engines.choose import choose_engine
from localrl.errors import ConfigError
from localrl.learning.credit import Credit, assign_credit, with_expected_reward
from localrl.learning.selection import Selection, select
from localrl.learning.update import Updater
from localrl.policy.forest_packing import Layout
from localrl.policy.model import Policy, read_shape
from localrl.policy.packing import MicroBatch, forest_batches, row_batches
from localrl.records import Batch, Example, Group, MemoryPlan, ScoredGroup
from localrl.rollouts.batch import TreeRequest
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups
from localrl.runs.folder import package_versions
from localrl.settings import LearningConfig
from localrl.training.memory_plan import make_plan
from localrl.training.resolved import load, local_plan_request, open_policy, resolve

PACKAGES = ("localrl", "mlx", "mlx-lm", "numpy")
LEAST_TOKENS = 4
PRIOR = 0.5
"""A prior between the rewards 0 and 1: every completion teaches something, even a single one."""


@dataclass(frozen=True)
class BenchRequest:
    """The measurements to make."""

    rows: tuple[int, ...]
    """Row counts decoded at once; the largest is also the group size of the update."""
    prompt_tokens: int
    tokens: int
    """Length of each completion."""
    repeats: int


@dataclass(frozen=True, eq=False)
class Opened:
    """A model with new adapters, as in a run."""

    config: RunConfig
    policy: Policy
    endless: Policy
    """The same policy without an end token."""
    plan: MemoryPlan
    updater: Updater
    request: BenchRequest
    """The measurements that the plan allows."""
    left_out: tuple[str, ...]
    """Descriptions of those that it does not allow."""
    prompt: tuple[int, ...]
    width: int
    """Width of the states between layers."""


@dataclass(frozen=True)
class DecodeRate:
    """Decoding rate of a number of rows at once."""

    rows: int
    tokens_per_s: float
    """Rate of all rows together, without the prefill."""
    step_ms: float
    """Mean time of one token for every row."""
    first_ms: float
    """Time of the prefill and the first token."""
    peak_bytes: int
    floor_ms: float | None = None
    """The least time of a token at this machine's rates; None if MLX computes the model."""


@dataclass(frozen=True)
class UpdateRate:
    """The rate of one update on one group."""

    completions: int
    positions: int
    """Positions computed in the pass with gradient, without padding."""
    trained_tokens: int
    update_s: float
    positions_per_s: float
    peak_bytes: int


def open_bench(
    model: str | None, quantize: int, request: BenchRequest, device: str = "auto"
) -> Opened:
    """Load the model within a plan for this machine's memory.

    Raises: ConfigError if it cannot be read or a number is too small; MemoryBudgetError if memory
    is too small.
    """
    if min(request.rows) < 1 or min(request.prompt_tokens, request.tokens) < LEAST_TOKENS:
        raise ConfigError(
            f"Rows must be at least 1, and prompt and completion at least {LEAST_TOKENS} tokens "
            f"long, not {request}."
        )
    config = _config(model, quantize, request, device)
    resolved = resolve(config)
    plan = make_plan(config, local_plan_request(resolved, trains=True))
    policy = choose_engine(open_policy(resolved, load(resolved), plan))
    endless = replace(policy, tokenizer=replace(policy.tokenizer, end_ids=frozenset()))
    draws = np.random.default_rng(0)
    shape = read_shape(resolved.model_folder)
    request, left_out = _allowed(request, plan)
    return Opened(
        config,
        policy,
        endless,
        plan,
        # The learning rate is so low that repeats use the same model.
        Updater(policy, LearningConfig(lr=1e-9), temperature=1.0),
        request,
        left_out,
        tuple(int(token) for token in draws.integers(0, shape.vocabulary, request.prompt_tokens)),
        shape.width,
    )


def measure(opened: Opened, told: Callable[[DecodeRate], None] = lambda rate: None) -> dict:
    """Return all but a profile, as `localrl bench --json` prints it. told: gets each rate."""
    load_average = os.getloadavg()
    rates, steps = [], {}
    least = needed(opened.policy)
    speeds = measure_rates() if least else None
    for rows in opened.request.rows:
        rate, steps[rows] = measure_decode(opened, rows)
        if least and speeds:
            rate = replace(rate, floor_ms=1e3 * least.floor_s(speeds, rows))
        rates.append(rate)
        told(rate)
    fitted = fit(steps, opened.request.prompt_tokens)
    return {
        **facts(opened, load_average),
        "rates": asdict(speeds) if speeds else None,
        "wanted": asdict(opened.request),
        "left_out": opened.left_out,
        "decode": [asdict(rate) for rate in rates],
        "fit": asdict(fitted) if fitted else None,
        "update": asdict(measure_update(opened)),
    }


def facts(opened: Opened, load: tuple[float, float, float] | None = None) -> dict:
    """Return the part of a report that says what was measured, and on what.

    load: load averages before the measurement; None: now.
    """
    return {
        "format": 1,
        "machine": {
            **asdict(backend.describe()),
            "cores": os.cpu_count(),
            "load": os.getloadavg() if load is None else load,
        },
        "kernels": str(kernels) if (kernels := opened.policy.engine.kernels) else None,
        "versions": package_versions(PACKAGES),
        "model": {
            "path": opened.config.model.path,
            "quantize": opened.config.model.quantize,
            "parameters": parameters(opened.policy),
            "dequantised": opened.plan.dequantise,
        },
    }


def measure_decode(opened: Opened, rows: int) -> tuple[DecodeRate, np.ndarray]:
    """Return the rate of these rows and seconds of each token after the first; medians of
    repeats."""
    decode_once(opened, rows)
    mx.reset_peak_memory()
    runs = np.array([decode_once(opened, rows) for _ in range(opened.request.repeats)])
    seconds = np.median(runs, axis=0)
    step_s = median(runs[:, 1:].mean(axis=1))
    rate = DecodeRate(
        rows, rows / step_s, 1e3 * step_s, 1e3 * float(seconds[0]), mx.get_peak_memory()
    )
    return rate, seconds[1:]


def decode_once(opened: Opened, rows: int, policy: Policy | None = None) -> np.ndarray:
    """Return (tokens,) seconds between forward calls; the first one includes the prefill."""
    marks: list[float] = []
    decoder = Decoder(
        policy or opened.endless, 1.0, rows, beat=lambda work: marks.append(time.perf_counter())
    )
    request = TreeRequest(0, ("bench",), rows, rows, opened.request.tokens)
    decoder.decode([opened.prompt], [request])
    spans = np.diff([*marks, time.perf_counter()])
    later = opened.request.tokens - 1
    return np.array([spans[:-later].sum(), *spans[-later:]])


def measure_update(opened: Opened) -> UpdateRate:
    """Measure the update on one group of the plan's group size."""
    batch = make_batch(opened, sample(opened, opened.endless)).batch
    opened.updater.update(batch, opened.plan)  # the first one also decides how the family is scored
    mx.reset_peak_memory()
    update_s = median(
        seconds(lambda: opened.updater.update(batch, opened.plan))
        for _ in range(opened.request.repeats)
    )
    positions = sum(_positions(micro) for micro in micro_batches(opened, batch))
    return UpdateRate(
        completions=opened.plan.group_size,
        positions=positions,
        trained_tokens=sum(int(node.trained.sum()) for node in batch.nodes),
        update_s=update_s,
        positions_per_s=positions / update_s,
        peak_bytes=mx.get_peak_memory(),
    )


def sample(opened: Opened, policy: Policy) -> list[Group]:
    """Sample one group of the prompt."""
    size = opened.plan.group_size
    return sample_groups(
        Decoder(policy, 1.0, opened.plan.decode_rows),
        [Example("bench", ({"role": "user", "content": "bench"},))],
        [opened.prompt],
        Shape(size, size),
        rule=None,
        max_completion_tokens=opened.request.tokens,
        seed=0,
        step=1,
        version=0,
    )


def make_batch(opened: Opened, groups: Sequence[Group]) -> Selection:
    """Make the batch of these groups with the rewards 0 and 1 in turn: every token is trained."""
    scored, credits = score_in_turn(groups)
    return select(scored, credits, float(opened.request.tokens), opened.updater.objective)


def score_in_turn(groups: Sequence[Group]) -> tuple[list[ScoredGroup], list[Credit]]:
    """Give the groups the rewards 0 and 1 in turn, and return them with their credit."""
    scored = []
    for group in groups:
        rewards = tuple(float(n % 2) for n in range(len(group.leaves)))
        expecting = with_expected_reward(group, PRIOR)
        scored.append(ScoredGroup(expecting, rewards, {"bench": rewards}))
    return scored, [assign_credit(group, kappa=1.0) for group in scored]


def micro_batches(opened: Opened, batch: Batch) -> list[MicroBatch]:
    """Split the batch as the updater does after its first batch."""
    pack = forest_batches if opened.updater.gradient.shared else row_batches
    return list(pack(batch, opened.plan.micro_rows))


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parameters(policy: Policy) -> int:
    """Return the number of the model's weights, without adapters; quantised ones count singly."""
    count = 0
    for _, module in policy.model.named_modules():
        for name, array in module.items():
            if not isinstance(array, mx.array) or name in ("lora_a", "lora_b"):
                continue
            if not hasattr(module, "bits"):
                count += array.size
            elif name == "weight":
                count += array.size * 32 // module.bits
    return count


def _positions(micro: MicroBatch) -> int:
    return micro.tokens.positions if isinstance(micro.tokens, Layout) else micro.tokens.size


def _config(model: str | None, quantize: int, request: BenchRequest, device: str) -> RunConfig:
    return RunConfig.create(
        {
            "model.path": model,
            "model.quantize": quantize,
            "model.device": device,
            "rollout.prompts_per_step": 1,
            "rollout.group_size": max(request.rows),
            "rollout.max_prompt_tokens": request.prompt_tokens,
            "rollout.max_completion_tokens": request.tokens,
        }
    )


def _allowed(request: BenchRequest, plan: MemoryPlan) -> tuple[BenchRequest, tuple[str, ...]]:
    """Return the measurements that fit in memory, and descriptions of those that do not."""
    rows = tuple(n for n in request.rows if n <= plan.decode_rows)
    tokens = min(request.tokens, plan.max_completion_tokens)
    most = max(request.rows)
    left_out = [f"{n} rows" for n in request.rows if n not in rows]
    left_out += [f"tokens {request.tokens} -> {tokens}"] * (tokens < request.tokens)
    left_out += [f"group {most} -> {plan.group_size}"] * (plan.group_size < most)
    # At least one row: the plan never has fewer.
    return replace(request, rows=rows or (plan.decode_rows,), tokens=tokens), tuple(left_out)
