"""Relative size of adapters: the norm of their products compared with that of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.policy.lora import adapted_layers
from localrl.policy.precision import weight_of


def weight_norms(model: Any) -> mx.array:
    """Compute Frobenius norms (n,) of the adapted weights, dequantised one layer at a time."""
    norms = []
    for _, layer in adapted_layers(model):
        norms.append(mx.sqrt(mx.square(weight_of(layer.linear).astype(mx.float32)).sum()))
        mx.eval(norms[-1])
    return mx.stack(norms)


def relative_size(model: Any, norms: mx.array) -> float:
    """Compute the mean over adapted layers of |scale B A| / |W|, with Frobenius norms.

    Experts count together as one layer. The product is never formed: |B A|^2 is the sum over
    (A A^T) * (B^T B), which are (rank, rank).
    """
    squares = [_square(*layer.factors) * layer.scale**2 for _, layer in adapted_layers(model)]
    sizes = mx.sqrt(mx.maximum(mx.stack(squares), 0.0))
    # The bound avoids division by zero for a layer of zeros.
    return float(np.array((sizes / mx.maximum(norms, 1e-12)).mean()))


def _square(a: mx.array, b: mx.array) -> mx.array:
    """|B A|^2 of factors A (..., rank, inputs) and B (..., outputs, rank)."""
    return ((a @ a.swapaxes(-1, -2)) * (b.swapaxes(-1, -2) @ b)).sum()
