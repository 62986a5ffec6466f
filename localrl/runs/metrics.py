"""The metrics of a step: one table with the meaning of each, and the functions that compute them.

Names are TRL's if TRL has the metric, else `section/name`. `docs/metrics.md` is generated from this
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from localrl.records import DropReason, ScoredGroup, StepStats, mean_or_none

METRICS: dict[str, tuple[str, str]] = {
    "step": ("", "training step, from 1"),
    "epoch": ("epochs", "passes over the training prompts; null for an endless task"),
    "num_tokens": ("tokens", "completion tokens sampled since the start of training"),
    "reward": ("reward", "mean over the completions that have a reward"),
    "reward_std": ("reward", "standard deviation over all those completions"),
    "rewards/<name>/mean": ("reward", "the same for one reward function, before its weight"),
    "rewards/<name>/std": ("reward", "the same for one reward function, before its weight"),
    "frac_reward_zero_std": ("share", "groups whose rewards are all equal"),
    "rewards/failures": ("calls", "reward calls since the start that gave a completion no reward"),
    "completions/mean_length": (
        "tokens",
        "mean number written by the model, with the end token",
    ),
    "completions/min_length": ("tokens", "shortest completion"),
    "completions/max_length": ("tokens", "longest completion"),
    "completions/clipped_ratio": ("share", "completions cut off at max_completion_tokens"),
    "entropy": ("nats", "mean over sampled tokens, of the whole distribution"),
    "kl": (
        "nats",
        "mean over trained tokens, from the adapter given or else the base, weighted as in the "
        "loss; null if learning.kl_coef is 0",
    ),
    "loss": (
        "",
        "the objective; near 0 on fresh rollouts, where only its gradient matters; of given "
        "completions their mean -log-probability per token",
    ),
    "grad_norm": ("", "global norm of the gradient before clipping"),
    "learning_rate": ("", "learning rate of this step's first update"),
    "clip_ratio/low_mean": (
        "share",
        "trained tokens clipped at 1 - clip_low in the step's last update; 0 if it has only one",
    ),
    "clip_ratio/high_mean": ("share", "the same at 1 + clip_high"),
    "sampling/sampling_logp_difference/mean": (
        "nats",
        "|update's log-probability - sampler's| of trained tokens, before their first update",
    ),
    "sampling/sampling_logp_difference/max": ("nats", "the largest of these"),
    "sampling/truncated": (
        "share",
        "trained tokens whose correction for that difference was cut to 2",
    ),
    "rollout/groups": ("groups", "prompts of the step"),
    "rollout/informative_groups": ("groups", "groups with a coefficient other than 0"),
    "rollout/turns": ("turns", "mean over completions, if they talk to an environment"),
    "rollout/sequences": (
        "sequences",
        "mean over completions: 1, or more if an agent's call did not continue an earlier one",
    ),
    "rollout/failed": ("completions", "whose environment or agent failed: they have no reward"),
    "tools/call_frequency": ("calls", "tool calls, mean over completions"),
    "tools/failure_frequency": ("share", "tool calls of the step that failed; null without any"),
    "rollout/rounds": ("rounds", "largest number of rounds of a prompt"),
    "rollout/completions": ("completions", "completions of the step"),
    "rollout/tokens": ("tokens", "completion tokens sampled, or given, in the step"),
    "rollout/reused_tokens": ("tokens", "tokens of earlier completions that new ones started from"),
    "rollout/rescored_tokens": (
        "tokens",
        "tokens of earlier policies, scored under this one in a forward pass, whether used or not",
    ),
    "selection/trained": ("completions", "completions that teach something"),
    "selection/no_reward": ("completions", "left out: their reward failed or did not apply"),
    "selection/no_coefficient": (
        "completions",
        "left out: as good as expected, teach nothing",
    ),
    "selection/truncated": ("completions", "left out by learning.mask_truncated"),
    "rollout/forward_calls": ("calls", "forward passes of the rollouts"),
    "rollout/prefill_positions": ("positions", "prompt tokens prefilled"),
    "rollout/decode_positions": ("positions", "rows decoded, summed over the calls"),
    "tree/saved_tokens": ("tokens", "tokens sampled once, but part of several completions"),
    "tree/forks_per_path": ("forks", "mean over completions; 0 for flat groups"),
    "update/saved_positions": (
        "positions",
        "not computed again: shared prompts and nodes",
    ),
    "update/trained_tokens": ("tokens", "tokens with a coefficient or a KL weight other than 0"),
    "update/skipped_tokens": (
        "tokens",
        "tokens sampled or reused but not trained; the others are trained_tokens",
    ),
    "update/drift": (
        "nats",
        "mean |change of log-probability| due to the step, over some of its trained tokens",
    ),
    "update/relative_size": (
        "share",
        "Frobenius norm of the adapters' change relative to that of the weights, mean over layers",
    ),
    "update/applied": ("", "true if the adapters changed"),
    "time/rollout_s": ("s", "sampling, including the rewards that it needs"),
    "time/reward_s": ("s", "part of it spent in reward functions"),
    "time/update_s": ("s", "gradient and optimizer"),
    "time/evaluation_s": ("s", "an evaluation, on the line of its `eval/` keys"),
    "step_time": ("s", "the whole step"),
    "ranks/<rank>/tokens": (
        "tokens",
        "sampled by this rank in the step, if there are several",
    ),
    "ranks/<rank>/tokens_per_s": (
        "tokens/s",
        "these tokens per second in which the rank did not wait",
    ),
    "ranks/<rank>/waited_s": ("s", "time spent waiting for other ranks or the network"),
    "memory/peak_bytes": ("bytes", "peak memory of MLX in the step"),
    "memory/cache_bytes": ("bytes", "freed buffers kept by MLX at the end of the step"),
    "memory/resident_bytes": (
        "bytes",
        "memory of the process at the step's end; null if unknown",
    ),
    "eval/pass@1": ("share", "held-out completions with the highest reward"),
    "eval/n": ("completions", "held-out completions that have a reward"),
    "eval/mean_reward": ("reward", "mean over these completions"),
    "eval/mean_completion_tokens": ("tokens", "mean length of held-out completions"),
    "eval/loss": (
        "nats",
        "mean -log-probability per token of held-out worked examples, if completions are given",
    ),
    "eval/temperature": ("", "sampling temperature of the evaluation; 0 means greedy decoding"),
}
"""Unit and meaning of every key of metrics.jsonl."""


def rollout_metrics(scored: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Return the metrics of the step's rollouts alone."""
    completions = [completion for group in scored for completion in group.group.completions()]
    lengths = [int(completion.sampled.sum()) for completion in completions]
    entropies = np.concatenate([completion.entropies for completion in completions])
    written = np.concatenate([completion.sampled for completion in completions])
    known = entropies[written]  # NaN where no sampler wrote the token
    sampled = sum(_sampled(group) for group in scored)
    reused = sum(_sampled(group, stale=True) for group in scored)
    rewards = _known([reward for group in scored for reward in group.rewards])
    spreads = [set(_known(group.rewards)) for group in scored]
    metrics: dict[str, Any] = {
        "reward": mean_or_none(rewards),
        "reward_std": _std(rewards),
        "frac_reward_zero_std": float(np.mean([len(spread) < 2 for spread in spreads])),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": float(
            np.mean([completion.finish_reason == "length" for completion in completions])
        ),
        "entropy": None if np.isnan(known).any() else float(known.mean()),
        "rollout/groups": len(scored),
        "tree/saved_tokens": int(written.sum()) - sampled,
        "tree/forks_per_path": float(np.mean([f for group in scored for f in _forks(group)])),
        "rollout/rounds": 1 + max(node.round for group in scored for node in group.group.nodes),
        "rollout/completions": len(completions),
        "rollout/tokens": sampled - reused,
        "rollout/reused_tokens": reused,
    }
    for name in scored[0].parts:
        part = _known([value for group in scored for value in group.parts[name]])
        metrics[f"rewards/{name}/mean"] = mean_or_none(part)
        metrics[f"rewards/{name}/std"] = _std(part)
    return metrics | _turn_metrics(scored)


def _turn_metrics(scored: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Return the metrics of completions that talk to an environment; empty for others."""
    leaves = [leaf for group in scored for leaf in group.group.leaves]
    turns = [sum(m["role"] == "assistant" for m in leaf.messages) for leaf in leaves]
    if not any(turns):
        return {}
    return {
        "rollout/turns": float(np.mean(turns)),
        "rollout/sequences": float(np.mean([1 + len(leaf.beside) for leaf in leaves])),
        "rollout/failed": sum(leaf.finish_reason == "error" for leaf in leaves),
    }


def selection_metrics(
    scored: Sequence[ScoredGroup],
    dropped: Sequence[Sequence[DropReason | None]],
    trained_tokens: int,
) -> dict[str, Any]:
    """Return the counts of what happened to each completion and token of a step."""
    reasons = [reason for group in dropped for reason in group]
    tokens = sum(_sampled(group) for group in scored)
    return {
        "selection/trained": reasons.count(None),
        **{f"selection/{_key(why)}": reasons.count(why) for why in get_args(DropReason)},
        "update/skipped_tokens": tokens - trained_tokens,
    }


def update_metrics(stats: StepStats) -> dict[str, Any]:
    """Return the metrics of the update; null if there was none."""
    return {
        "kl": stats.kl,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "clip_ratio/low_mean": stats.clipped_low,
        "clip_ratio/high_mean": stats.clipped_high,
        "sampling/sampling_logp_difference/mean": stats.logprob_gap_mean,
        "sampling/sampling_logp_difference/max": stats.logprob_gap_max,
        "sampling/truncated": stats.truncated,
        "update/saved_positions": stats.saved_positions,
        "update/trained_tokens": stats.trained_tokens,
        "update/drift": stats.drift,
        "update/relative_size": stats.relative_size,
        "update/applied": stats.updated,
    }


def metrics_page() -> str:
    """Return `docs/metrics.md`, with the table for readers."""
    rows = [f"| `{name}` | {unit} | {text} |" for name, (unit, text) in METRICS.items()]
    head = (
        "# Metrics\n\nEvery key of `metrics.jsonl`, one JSON object per training step;\n"
        "evaluations add lines of their own with the `eval/` keys. A null is a number that is not\n"
        "known.\n\n"
        "| key | unit | meaning |\n|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def _forks(scored: ScoredGroup) -> list[int]:
    """Return the forks on the path to each completion: nodes on it that have siblings."""
    group = scored.group
    shared = [n.parent for n in group.nodes if n.parent >= 0]
    forked = {parent for parent in shared if shared.count(parent) > 1}
    return [sum(n in forked for n in group.path(leaf.node)) for leaf in group.leaves]


def _key(reason: DropReason) -> str:
    return reason.replace(" ", "_").replace("-", "_")


def sampled_tokens(scored: ScoredGroup) -> int:
    """Return the number of tokens that the model wrote in this step."""
    return _sampled(scored) - _sampled(scored, stale=True)


def _sampled(scored: ScoredGroup, *, stale: bool = False) -> int:
    """Return the number of tokens that the model wrote; if stale, that an earlier policy wrote."""
    nodes = [n for n in scored.group.nodes if not stale or n.old_logprobs is not None]
    return sum(int(node.sampled.sum()) for node in nodes)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
