"""A model's weights as arrays, by block: what passes and decoding go through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localrl.policy.array_math import Linears, Norm


@dataclass(frozen=True, eq=False)
class Block:
    """One layer of the model."""

    attention_norm: Norm
    queries_keys_values: Linears
    query_norm: Norm | None
    key_norm: Norm | None
    output: Linears
    feed_forward_norm: Norm
    gate_up: Linears
    down: Linears

    @property
    def adapted(self) -> bool:
        """Whether any of its layers has an adapter."""
        layers = (self.queries_keys_values, self.output, self.gate_up, self.down)
        return any(layer.down is not None for layer in layers)


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights as they were when they were read."""

    embedding: np.ndarray
    """(V, d)"""
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linears

    def logits(self, states: np.ndarray) -> np.ndarray:
        """(V, n) of states (d, n) after the last block."""
        return self.head(self.norm(states))[0]

    def logits_back(self, states: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Slope by the states (d, n), from that by their logits."""
        by_normed, _ = self.head.back(states, [slope])
        assert by_normed is not None
        return self.norm.back(states, by_normed)

    @property
    def lowest_adapted(self) -> int:
        """The first block with an adapter: the way back ends there."""
        adapted = (n for n, block in enumerate(self.blocks) if block.adapted)
        return next(adapted, len(self.blocks))
