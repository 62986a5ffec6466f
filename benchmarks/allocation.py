"""Completions allocated to the prompts of a step by what each is expected to tell per token.

A step has as many completions as its configured groups, at least one for every prompt, and the
others in proportion to sqrt(p (1 - p) / T), where p is the reward the tracker expects, T the length
it expects: Neyman's allocation (1934), which minimises the variance of the mean over strata at a
given cost. A prompt's completions share its weight, however many there are, and the numbers are
known before any of them is drawn; so the gradient is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localrl.records import Example, ScoredGroup
from localrl.rollouts.groups import Shape
from localrl.training.sampler import Sampler


@dataclass(eq=False)
class Allocation(Sampler):
    """Groups of different sizes. Those of one size are decoded together, so a step takes longer."""

    def _collect(self, step: int, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        configured = self.shape
        sizes = allocate(self._signal(examples), configured.roots * len(examples))
        found: dict[str, ScoredGroup] = {}
        try:
            for size in sorted(set(sizes)):
                some = [e for e, n in zip(examples, sizes, strict=True) if n == size]
                self.shape = Shape(size, size)
                groups = super()._collect(step, some, version)
                found |= {group.group.example.id: group for group in groups}
        finally:
            self.shape = configured
        return [found[example.id] for example in examples]

    def _signal(self, examples: Sequence[Example]) -> np.ndarray:
        """Return sqrt(p (1 - p) / T) of each prompt; all alike before anything is known."""
        keys = [example.tracker_key for example in examples]
        alpha, beta = np.array([self.tracker.posterior(key) for key in keys]).T
        p = alpha / (alpha + beta)
        tokens = np.array([self.tracker.expected_tokens(key) or 1.0 for key in keys])
        return np.sqrt(p * (1 - p) / tokens)


def allocate(signal: np.ndarray, total: int) -> list[int]:
    """Divide a total of at least n: one each, the others in proportion, by largest remainders."""
    wanted = np.maximum(1.0, total * signal / signal.sum())
    while wanted.sum() > total + 1e-9:  # raising some to 1 has taken from the others
        above = wanted > 1
        wanted[above] *= (total - (~above).sum()) / wanted[above].sum()
        wanted = np.maximum(1.0, wanted)
    sizes = np.floor(wanted + 1e-9).astype(int)
    order = np.argsort(sizes - wanted, kind="stable")
    sizes[order[: total - sizes.sum()]] += 1
    return sizes.tolist()
