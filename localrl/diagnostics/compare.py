"""Evaluates a model on held-out prompts, with and without an adapter; needs no run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from localrl.config import RunConfig
from localrl.errors import ConfigError
from localrl.evaluate import EVALUATION_SEED, at_temperature
from localrl.policy.lora import adapters_off
from localrl.processes.heartbeat import Heartbeat
from localrl.records import Group, ScoredGroup, mean_or_none
from localrl.rollouts.groups import Shape, sample_groups
from localrl.training.components import Components, check_sandbox, open_components
from localrl.training.resolved import resolve
from localrl.utils.intervals import (
    mcnemar,
    mean_interval,
    paired_interval,
    pass_at_k,
    share_interval,
    sign_flip,
)

RIGHT = 1 - 1e-9
"""Smallest first reward of a completion that passes, allowing for rounding."""


@dataclass(frozen=True)
class PassRate:
    """pass@k: the probability that at least one of k completions of a prompt passes."""

    k: int
    rate: float
    ci95: tuple[float, float]
    prompts: int
    """Number of prompts with at least k judged completions."""


@dataclass(frozen=True)
class Side:
    """The results of one policy on the held-out prompts."""

    pass_at: tuple[PassRate, ...]
    completions: int
    unjudged: int
    """Number of completions without a first reward: excluded from all rates."""
    mean_reward: float | None
    mean_completion_tokens: float
    cut_off: float
    """Share of completions that reached the length limit."""


@dataclass(frozen=True)
class Difference:
    """pass@1 of the adapter minus that of the base, on prompts judged on both sides."""

    value: float
    ci95: tuple[float, float] | None
    p: float
    """Two-sided p-value of the hypothesis that there is no difference."""
    test: str
    prompts: int
    base_better: int
    adapter_better: int
    """Number of prompts on which one passed more often than the other."""


@dataclass(frozen=True)
class Result:
    """An evaluation and its conditions."""

    task: str
    model: str
    adapter: str | None
    prompts: int
    held_out: bool
    """True if they were held out from training; False if they are all rows of a named file."""
    samples: int
    """Number of completions of each prompt."""
    temperature: float
    """Sampling temperature; 0 means greedy decoding."""
    max_completion_tokens: int
    seed: int
    base: Side
    with_adapter: Side | None
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; rates by name, as `pass@4`."""
        fields = asdict(self)
        for side in ("base", "with_adapter"):
            if fields[side] is not None:
                rates = fields[side].pop("pass_at")
                fields[side] |= {f"pass@{rate.pop('k')}": rate for rate in rates}
        return fields


def evaluate_model(
    config: RunConfig,
    *,
    samples: int = 1,
    seed: int = EVALUATION_SEED,
    whole: bool = False,
    warn: Callable[[str], None] = lambda line: None,
    tell: Callable[[str], None] = lambda line: None,
    heartbeat: Heartbeat | None = None,
) -> Result:
    """Sample prompts from the base, and with the adapter if `lora.adapter` names one.

    whole: True to measure on all rows of the task's data, not only on those held out.

    The temperature is that of the run's evaluations, see `RunConfig.eval_temperature`. Both sides
    draw with the same random numbers. warn, tell: called with lines for the user.

    Raises: ConfigError or DataError for what cannot work; RewardError if rewards fail.
    """
    temperature = config.eval_temperature
    if samples > 1 and not temperature:
        raise ConfigError(
            f"{samples} completions of each prompt would all be the same: at temperature 0 the "
            "most likely token is always taken. Ask for one (-k 1), or sample, for example with "
            "--temperature 0.7."
        )
    resolved = resolve(config)
    with open_components(
        resolved, warn=warn, heartbeat=heartbeat or Heartbeat(), trains=False, whole=whole
    ) as components:
        check_sandbox(components.config, components.task, warn)
        if not components.held_out:
            raise ConfigError("task.eval_prompts is 0: nothing to evaluate on. Set a number.")
        which = "prompts" if whole else "held-out prompts"
        tell(f"{len(components.held_out)} {which} of {components.task.name} x {samples}, base ...")
        with adapters_off(components.policy.model):
            base = _judge(components, samples, temperature, seed)
        passing, adapted = components.task.rewards[0].name, None
        if resolved.adapter is not None:
            tell("with the adapter ...")
            adapted = _judge(components, samples, temperature, seed)
        return Result(
            task=components.task.name,
            model=config.model.path or str(components.model_folder),
            adapter=components.config.lora.adapter,
            prompts=len(components.held_out),
            held_out=not whole,
            samples=samples,
            temperature=temperature,
            max_completion_tokens=components.plan.max_completion_tokens,
            seed=seed,
            base=_side(base, passing, samples),
            with_adapter=_side(adapted, passing, samples) if adapted else None,
            difference=_differ(passing, base, adapted, seed) if adapted else None,
        )


def _judge(
    components: Components, samples: int, temperature: float, seed: int
) -> list[ScoredGroup]:
    """Return scored completions of all held-out prompts, from the policy in its current state."""
    groups: list[Group] = sample_groups(
        at_temperature(components.decoder, temperature),
        components.held_out,
        components.sampler.encode(components.held_out),
        Shape(roots=samples, leaves=samples),
        rule=None,
        max_completion_tokens=components.plan.max_completion_tokens,
        seed=seed,
        step=0,
        version=0,
        turns=components.sampler.turns,
    )
    return components.scorer.score(groups)


def _verdicts(scored: ScoredGroup, passing: str) -> list[bool]:
    """Return True or False for each judged completion, depending on whether it passes."""
    return [verdict >= RIGHT for verdict in scored.parts[passing] if verdict is not None]


def _side(scored: Sequence[ScoredGroup], passing: str, samples: int) -> Side:
    verdicts = [_verdicts(group, passing) for group in scored]
    completions = [c for group in scored for c in group.group.completions()]
    rates = []
    for k in (2**i for i in range(samples.bit_length())):
        shares = [pass_at_k(len(v), sum(v), k) for v in verdicts if len(v) >= k]
        if shares:
            interval = share_interval(shares, samples)
            rates.append(PassRate(k, float(np.mean(shares)), interval, len(shares)))
    return Side(
        pass_at=tuple(rates),
        completions=len(completions),
        unjudged=len(completions) - sum(map(len, verdicts)),
        mean_reward=mean_or_none([r for g in scored for r in g.rewards if r is not None]),
        mean_completion_tokens=float(np.mean([c.sampled.sum() for c in completions])),
        cut_off=float(np.mean([c.finish_reason == "length" for c in completions])),
    )


def _differ(
    passing: str,
    base: Sequence[ScoredGroup],
    adapted: Sequence[ScoredGroup],
    seed: int,
) -> Difference | None:
    """Return the difference, or None if no prompt was judged on both sides."""
    pairs = [
        (one, other)
        for a, b in zip(base, adapted, strict=True)
        if (one := _verdicts(a, passing)) and (other := _verdicts(b, passing))
    ]
    return compare(pairs, seed) if pairs else None


def compare(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]], seed: int) -> Difference:
    """Compare the second side of each pair with the first: verdicts on one prompt's completions."""
    differences = [float(np.mean(other)) - float(np.mean(one)) for one, other in pairs]
    fewer, more = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    single = all(len(one) == len(other) == 1 for one, other in pairs)
    n = len(pairs)
    return Difference(
        value=float(np.mean(differences)),
        ci95=paired_interval(fewer, more, n) if single else mean_interval(differences),
        p=mcnemar(fewer, more) if single else sign_flip(differences, seed),
        test="exact McNemar" if single else "sign flips over prompts",
        prompts=n,
        base_better=fewer,
        adapter_better=more,
    )
