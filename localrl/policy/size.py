"""Relative size of adapters: the norm of their products compared with that of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from localrl.backend import mx, nn
from localrl.policy.lora import LoRALinear


def weight_norms(model: Any) -> mx.array:
    """Compute Frobenius norms (n,) of the adapted weights, dequantised one layer at a time."""
    norms = []
    for layer in _adapted(model):
        norms.append(mx.linalg.norm(_weight(layer.linear).astype(mx.float32)))
        mx.eval(norms[-1])
    return mx.stack(norms)


def relative_size(model: Any, norms: mx.array) -> float:
    """Compute the mean over adapted layers of |scale A B| / |W|, with Frobenius norms.

    The product is never formed: |A B|^2 is the sum over (A^T A) * (B B^T), which are (rank, rank).
    """
    squares = [
        layer.scale**2 * ((layer.lora_a.T @ layer.lora_a) * (layer.lora_b @ layer.lora_b.T)).sum()
        for layer in _adapted(model)
    ]
    sizes = mx.sqrt(mx.maximum(mx.stack(squares), 0.0))
    # The bound avoids division by zero for a layer of zeros.
    return float(np.array((sizes / mx.maximum(norms, 1e-12)).mean()))


def _adapted(model: Any) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def _weight(linear: Any) -> mx.array:
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )
