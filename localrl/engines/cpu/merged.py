"""Weights for decoding, with the adapters merged in.

A token of a few rows takes a hundred products of small matrices, more than half of them for the
adapters. A merged copy needs none of those. It is made before rows are decoded and freed with them;
a larger model would gain less than the copy costs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

from localrl.backend import mx
from localrl.engines.cpu.buffers import persistent_zeros
from localrl.engines.cpu.math import FusedLinear, matmul
from localrl.engines.cpu.weights import Block, Weights

MOST_BYTES = 128 << 20
"""Maximum size of a copy; a larger model would gain less than it costs."""


class Merging:
    """The merged weights of a model, kept as long as a state decodes with them."""

    def __init__(self) -> None:
        self._made_of: Sequence[mx.array] = ()
        self._merged: weakref.ref[Weights] | None = None

    def of(self, weights: Weights, made_of: Sequence[mx.array]) -> Weights:
        """Return merged weights to decode with; `made_of` are the arrays of the adapters."""
        known = self._merged() if self._merged is not None else None
        # MLX arrays never change in place, so the same objects hold the same numbers.
        if known is None or list(map(id, made_of)) != list(map(id, self._made_of)):
            known = merged(weights)
            self._merged, self._made_of = weakref.ref(known), made_of
        return known


def merged(weights: Weights) -> Weights:
    """Make a merged copy for decoding, or return the weights if it would be too large."""
    if sum(map(_bytes, weights.blocks)) > MOST_BYTES:
        return weights
    return replace(weights, blocks=tuple(map(_block, weights.blocks)))


def _block(block: Block) -> Block:
    return replace(
        block,
        queries_keys_values=_merge(block.queries_keys_values),
        output=_merge(block.output),
        gate_up=_merge(block.gate_up),
        down=_merge(block.down),
    )


def _merge(linears: FusedLinear) -> FusedLinear:
    if linears.lora_a is None or linears.lora_b is None:
        return linears
    whole = matmul(linears.lora_b, linears.lora_a, persistent_zeros(linears.weight.shape))
    whole += linears.weight
    return FusedLinear(whole, linears.places, linears.bias)


def _bytes(block: Block) -> int:
    layers = (block.queries_keys_values, block.output, block.gate_up, block.down)
    return sum(layer.weight.nbytes for layer in layers)
