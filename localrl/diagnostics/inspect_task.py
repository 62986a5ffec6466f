"""Inspects a task before training: the prompts the model will see, and scores of gold answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localrl.errors import RewardError
from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, ScoredGroup
from localrl.rewards.scoring import Scorer
from localrl.tasks.base import Task
from localrl.tasks.environments import Environments
from localrl.tasks.gold import completion_of, gold_completion, score_gold
from localrl.training.reward_checks import NEEDS

JUDGES = (*NEEDS, "localrl.rewards.json_answers:json_reward")
"""Built-in rewards that a gold answer alone must get something from."""
ENDLESS = 1000
"""Number of examples that represent an endless task."""


@dataclass(frozen=True)
class TaskReport:
    """The findings of `inspect_task`."""

    training: int
    held_out: int
    repeated: int
    """Number of training examples whose prompt occurred before."""
    prompt_tokens: tuple[int, int, int]
    """Minimum, median and maximum length of the training prompts."""
    too_long: int
    """Number of prompts, including held-out ones, that are longer than allowed."""
    unknown: str
    """Characters that the model has no token for."""
    unanswered: int
    """Number of training examples without a gold answer; 0 if answers are not scored."""
    gold: tuple[ScoredGroup, ...]
    """Gold answers scored as completions, for the examples that have one."""
    learns_nothing: str
    """Reason that a run would learn nothing from the gold answers; empty if there is none."""
    reward_s: float | None
    """Seconds for scoring one step's worth of completions; None if completions would have to talk
    to an environment first."""

    @property
    def wrong(self) -> list[ScoredGroup]:
        """Gold answers that the first reward function does not score 1, including None."""
        return [g for g in self.gold if (next(iter(g.parts.values()))[0] or 0.0) < 1 - 1e-9]


def inspect_task(
    task: Task,
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    per_step: int,
    gold: bool,
    environments: Environments | None = None,
) -> TaskReport:
    """Inspect the training and held-out examples of a task; nothing is sampled.

    per_step: number of completions whose scoring is timed. gold: True if an answer by itself is a
    correct completion, so that it can be scored.

    Raises: the errors of `Scorer.score`.
    """
    training = [task.train(i) for i in range(task.train_size or ENDLESS)]
    held_out = task.evaluation(ENDLESS)
    lengths = [len(ids) for ids in encode(training, tokenizer, environments)]
    others = [len(ids) for ids in encode(held_out, tokenizer, environments)]
    prompts = Counter(str(example.messages) for example in training)
    gold = gold and environments is None
    examples = [example for example in training if gold and example.answer is not None]
    scored = score_gold(examples, scorer.score, tokenizer, task.rewards)
    return TaskReport(
        training=task.train_size,
        held_out=len(held_out),
        repeated=len(training) - len(prompts),
        prompt_tokens=(min(lengths), int(np.median(lengths)), max(lengths)),
        too_long=sum(n > max_prompt_tokens for n in (*lengths, *others)),
        unknown=unknown(tokenizer, training[:8]),
        unanswered=len(training) - len(examples) if gold else 0,
        gold=tuple(scored),
        learns_nothing=_learns_nothing(task, scored, scorer, tokenizer) if gold else "",
        reward_s=None
        if environments
        else _reward_seconds(task, scorer, training, tokenizer, per_step),
    )


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, environments: Environments | None
) -> list[tuple[int, ...]]:
    """Encode the examples' prompts as a run would."""
    if environments is not None:
        return environments.prompts(examples)
    return tokenizer.encode_prompts(examples)


def unknown(tokenizer: Tokenizer, examples: Sequence[Example]) -> str:
    """Return the characters of the prompts that the tokenizer has no token for, each once."""
    found = "".join(tokenizer.unknown(example.messages) for example in examples)
    return "".join(dict.fromkeys(found))


def _learns_nothing(
    task: Task, scored: Sequence[ScoredGroup], scorer: Scorer, tokenizer: Tokenizer
) -> str:
    """Say so if the first reward tells no gold answer from an empty completion."""
    judge = task.rewards[0]
    if judge.target.startswith("localrl.") and not judge.target.startswith(JUDGES):
        return ""
    if not scored:
        needs = judge.target.startswith(NEEDS)
        return f"no row has the gold answer that {judge.name!r} compares with" if needs else ""
    values = [group.parts[judge.name][0] for group in scored]
    if not all(value is None or value <= 0 for value in values):
        return ""
    empty = [completion_of(group.group.example, "", tokenizer) for group in scored]
    try:
        others = [group.parts[judge.name][0] for group in scorer.score(empty)]
    except RewardError:
        others = [None] * len(empty)
    pairs = zip(values, others, strict=True)
    if any(value is not None and (other is None or value > other) for value, other in pairs):
        return ""
    return (
        f"{judge.name!r} gives none of {len(scored)} gold answers more than an empty completion "
        f"({values[0]} for {scored[0].group.example.id})"
    )


def _reward_seconds(
    task: Task, scorer: Scorer, training: Sequence[Example], tokenizer: Tokenizer, count: int
) -> float:
    golds = [gold_completion(example, tokenizer, task.rewards) for example in training[:count]]
    groups = [golds[i % len(golds)] for i in range(count)]
    started = time.perf_counter()
    scorer.score(groups)
    return time.perf_counter() - started
