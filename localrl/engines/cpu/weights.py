"""A model's weights as arrays, by block, as used by passes and decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localrl.engines.cpu.math import FusedLinear, Norm, matmul_rows


@dataclass(frozen=True, eq=False)
class Block:
    """One layer of the model."""

    attention_norm: Norm
    queries_keys_values: FusedLinear
    query_norm: Norm | None
    key_norm: Norm | None
    output: FusedLinear
    feed_forward_norm: Norm
    gate_up: FusedLinear
    down: FusedLinear

    @property
    def adapted(self) -> bool:
        """True if any of its layers has an adapter."""
        layers = (self.queries_keys_values, self.output, self.gate_up, self.down)
        return any(layer.lora_a is not None for layer in layers)


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights at the time they were read."""

    embedding: np.ndarray
    """Token embeddings (V, d)."""
    blocks: tuple[Block, ...]
    norm: Norm
    head: FusedLinear

    def logits(self, states: np.ndarray) -> np.ndarray:
        """Logits (n, V) from hidden states (d, n) after the last block."""
        found = matmul_rows(self.norm(states), self.head.weight)
        if self.head.bias is not None:
            found += self.head.bias[:, 0]
        return found

    @property
    def lowest_adapted(self) -> int:
        """Index of the first block with an adapter: the backward pass ends there."""
        adapted = (n for n, block in enumerate(self.blocks) if block.adapted)
        return next(adapted, len(self.blocks))
