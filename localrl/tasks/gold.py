"""Gold answers as completions, to see what the rewards make of them before anything is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, Group, Leaf, Node, RewardSpec, ScoredGroup
from localrl.rewards.golds import gold_letter, text_of_gold
from localrl.tasks.rows import is_empty

CALLS = (1, 4, 15, 60, 120)
"""Numbers of answers scored in each call of the rewards: 200 in all."""
Score = Callable[[Sequence[Group]], list[ScoredGroup]]


LEADS = {
    "localrl.rewards.answers:final_answer": "# ",
    "localrl.rewards.accuracy:reasoning_accuracy_reward": "</think>",
}
"""Text that a right answer needs before it, by built-in reward."""
READERS = {
    "localrl.rewards.accuracy:choice_reward": gold_letter,
    "localrl.rewards.accuracy:": text_of_gold,
    "localrl.rewards.latex:": text_of_gold,
}
"""Built-in rewards that take `solution` where they cannot read `answer`, and what reads it."""
TAKES_LISTS = "localrl.rewards.json_answers:"
"""Built-in rewards for which a list is one answer; for others it holds accepted ones."""


def gold_completion(
    example: Example, tokenizer: Tokenizer, rewards: Sequence[RewardSpec] = ()
) -> Group:
    """Return a group whose only completion is the gold answer, or empty without one.

    It has no prompt tokens, which rewards do not see. Of several accepted answers it is the first
    that the first of `rewards` can read, which may need more words.
    """
    target = rewards[0].target if rewards else ""
    return completion_of(example, _gold_text(_chosen(example, target), target), tokenizer)


def completion_of(example: Example, text: str, tokenizer: Tokenizer) -> Group:
    """Return a group without prompt tokens whose only completion is this text."""
    ids = np.array(tokenizer.inner.encode(text, add_special_tokens=False), np.int32)
    zeros = np.zeros(len(ids), np.float32)
    node = Node(-1, ids, np.ones(len(ids), bool), zeros, zeros)
    return Group(example, (), (node,), (Leaf(0, "stop", text),), 1)


def _chosen(example: Example, target: str) -> Any:
    """The gold answer that a reward compares with, of the columns it looks at."""
    if target.startswith(TAKES_LISTS):
        return example.answer
    golds = _accepted(example.answer)
    read = next((READERS[place] for place in READERS if target.startswith(place)), None)
    if read is not None:
        golds += _accepted(example.columns.get("solution"))
        golds = [gold for gold in golds if read(gold) is not None] or golds
    return golds[0] if golds else None


def _accepted(answer: Any) -> list[Any]:
    values = answer if isinstance(answer, (list, tuple)) else [answer]
    return [value for value in values if not is_empty(value)]


def _gold_text(gold: Any, target: str) -> str:
    if gold is None:
        return ""
    text = gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)
    return LEADS.get(target, "") + text


def score_gold(
    examples: Sequence[Example],
    score: Score,
    tokenizer: Tokenizer,
    rewards: Sequence[RewardSpec] = (),
    *,
    budget_s: float = np.inf,
) -> list[ScoredGroup]:
    """Score the gold answers of up to 200 examples, spread evenly over the given ones.

    rewards: see `gold_completion`. budget_s: seconds after which no further call is made, because
    the rewards are slow.

    Raises: the errors of `Scorer.score`.
    """
    count = min(sum(CALLS), len(examples))
    chosen = [examples[i * len(examples) // count] for i in range(count)]
    scored: list[ScoredGroup] = []
    started = time.perf_counter()
    for size in CALLS:
        batch = chosen[len(scored) : len(scored) + size]
        if not batch or (scored and time.perf_counter() - started > budget_s):
            break
        scored += score([gold_completion(example, tokenizer, rewards) for example in batch])
    return scored
