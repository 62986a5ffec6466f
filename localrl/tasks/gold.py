"""Gold answers as completions, to see what the rewards make of them before anything is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, Group, Leaf, Node, ScoredGroup

CALLS = (1, 4, 15, 60, 120)
"""Numbers of answers scored in each call of the rewards: 200 in all."""
Score = Callable[[Sequence[Group]], list[ScoredGroup]]


def gold_completion(example: Example, tokenizer: Tokenizer) -> Group:
    """Return a group whose only completion is the gold answer, or empty without one.

    It has no prompt tokens, which rewards do not see.
    """
    gold = "" if example.answer is None else example.answer
    text = gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)
    ids = np.array(tokenizer.inner.encode(text, add_special_tokens=False), np.int32)
    zeros = np.zeros(len(ids), np.float32)
    node = Node(-1, ids, np.ones(len(ids), bool), zeros, zeros)
    return Group(example, (), (node,), (Leaf(0, "stop", text),), 1)


def score_gold(
    examples: Sequence[Example], score: Score, tokenizer: Tokenizer, *, budget_s: float = np.inf
) -> list[ScoredGroup]:
    """Score the gold answers of up to 200 examples, spread evenly over the given ones.

    budget_s: seconds after which no further call is made, because the rewards are slow.

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
        scored += score([gold_completion(example, tokenizer) for example in batch])
    return scored
