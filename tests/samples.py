"""Samples of a few prompts of different lengths, flat or with forks at given lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localrl.records import Example
from localrl.rollouts.decode import Decoder, LiveView
from localrl.rollouts.forking import within_budget
from localrl.rollouts.groups import Shape, sample_groups

TEXTS = ("12", "sum 1 2 3 and more of it", "a", "zebra 99")


@dataclass
class Forks:
    at: tuple[int, ...]

    def choose(self, view: LiveView) -> np.ndarray:
        return within_budget(np.isin(view.lengths, self.at) & view.alive, view.entropies, view)


def sample(policy, *, rows=64, roots=4, leaves=4, at=(), prefill_rows=0):
    examples = [Example(id=text, messages=({"role": "user", "content": text},)) for text in TEXTS]
    return sample_groups(
        Decoder(policy, 0.8, rows, prefill_rows=prefill_rows),
        examples,
        [policy.tokenizer.encode(example.messages) for example in examples],
        Shape(roots, leaves),
        max_completion_tokens=16,
        seed=0,
        step=1,
        version=0,
        rule=Forks(at) if at else None,
    )
