"""Adapted layers prepared for decoding: three kernels for all that receive the same input.

A decode step computes few positions, so launching kernels takes longer than the products in them.
Casting and scaling every adapter for every token, two products and an addition per layer would
launch three times as many as the model alone. Here they are cast and scaled once per update, and
layers with one input, such as those of queries, keys and values, are computed together:

    (y1 y2 y3) = x (W1 W2 W3) + (x (A1 A2 A3)) diag(B1, B2, B3)

where the last product and the addition are one kernel. The frozen weights lie side by side in one
array, of which each layer keeps its part as a view, so they exist once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from localrl.backend import mx, nn
from localrl.policy.lora import LoRALinear, linear_shape

FORMAT = ("bits", "group_size", "mode")
"""Attributes in which quantised layers must agree to be computed together."""


@dataclass(frozen=True, eq=False)
class Siblings:
    """Adapted layers that receive the same input and hold weights of the same format."""

    layers: tuple[LoRALinear, ...]
    dtype: mx.Dtype
    """Dtype of their input."""


def find_siblings(model: Any) -> tuple[Siblings, ...]:
    """Find the adapted layers that a pass calls with the same array; nothing is computed."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    calls: list[tuple[mx.array, LoRALinear]] = []
    frozen = [layer.linear for layer in layers]
    for layer, linear in zip(layers, frozen, strict=True):
        # As an item, which keeps its place: the order of parameters must not change.
        layer["linear"] = _recorder(layer, linear, calls)
    try:
        model(mx.array([[1, 2]]))
    finally:
        for layer, linear in zip(layers, frozen, strict=True):
            layer["linear"] = linear
    groups: dict[Hashable, dict[int, LoRALinear]] = {}
    inputs: dict[Hashable, mx.array] = {}
    for x, layer in calls:
        key = (id(x), *_format(layer.linear))
        groups.setdefault(key, {})[id(layer)] = layer
        inputs[key] = x
    return tuple(Siblings(tuple(groups[key].values()), inputs[key].dtype) for key in groups)


def prepare(siblings: Iterable[Siblings]) -> None:
    """Prepare the layers whose adapters have changed since the last time."""
    for group in siblings:
        if not all(isinstance(n.prepared, _Part) and n.prepared.is_of(n) for n in group.layers):
            together = _Together(group)
            mx.eval(together.lora_a, together.lora_b)
            ends = list(accumulate(together.outputs))
            for layer, start, end in zip(group.layers, [0, *ends], ends, strict=False):
                layer.prepared = _Part(layer, together, slice(start, end))


def _recorder(
    layer: LoRALinear, linear: Any, calls: list[tuple[mx.array, LoRALinear]]
) -> Callable[[mx.array], mx.array]:
    def record(x: mx.array) -> mx.array:
        calls.append((x, layer))
        return linear(x)

    return record


def _format(linear: Any) -> tuple[Hashable, ...]:
    dtypes = [(name, array.dtype) for name, array in linear.items()]
    return (type(linear), *dtypes, *(getattr(linear, name, None) for name in FORMAT))


class _Together:
    """Layers computed together, for the first of them that is called with an input."""

    def __init__(self, group: Siblings) -> None:
        self.outputs = [linear_shape(layer.linear)[0] for layer in group.layers]
        self.dtype = group.dtype
        self.lora_a = mx.concatenate([n.lora_a.astype(group.dtype) for n in group.layers], axis=1)
        self.lora_b = _diagonal([n.scale * n.lora_b for n in group.layers]).astype(group.dtype)
        self._linear = _join([layer.linear for layer in group.layers])
        self._x: mx.array | None = None
        self._y: mx.array | None = None
        self._left = 0

    def __call__(self, x: mx.array) -> mx.array:
        """Compute all layers, (..., sum of outputs)."""
        if self._y is None or self._x is not x:
            flat = x.reshape(-1, x.shape[-1])
            y = mx.addmm(self._linear(flat), flat @ self.lora_a, self.lora_b)
            self._x, self._y = x, y.reshape(*x.shape[:-1], y.shape[-1])
            self._left = len(self.outputs)
        y = self._y
        self._left -= 1
        if not self._left:  # a prefill's activations must not outlive it
            self._x = self._y = None
        return y


class _Part:
    """One of several layers computed together: see `Prepared`."""

    def __init__(self, layer: LoRALinear, together: _Together, outputs: slice) -> None:
        self._source = (layer.lora_a, layer.lora_b, layer.scale)
        self._together = together
        self._outputs = outputs

    def is_of(self, layer: LoRALinear) -> bool:
        """Return True if the layer still holds these very arrays, which are never modified."""
        lora_a, lora_b, scale = self._source
        return layer.lora_a is lora_a and layer.lora_b is lora_b and layer.scale == scale

    def fits(self, layer: LoRALinear, x: mx.array) -> bool:
        """Return True if it was prepared from the layer's present weights, for such an input."""
        return x.dtype == self._together.dtype and self.is_of(layer)

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the layer."""
        return self._together(x)[..., self._outputs]


def _diagonal(blocks: Sequence[mx.array]) -> mx.array:
    """Place matrices along the diagonal of one that is 0 elsewhere."""
    width = sum(block.shape[1] for block in blocks)
    starts = [0, *accumulate(block.shape[1] for block in blocks)]
    rows = [
        mx.pad(block, [(0, 0), (start, width - start - block.shape[1])])
        for block, start in zip(blocks, starts, strict=False)
    ]
    return mx.concatenate(rows)


def _join(linears: Sequence[Any]) -> nn.Module:
    """Join frozen layers into one, of whose arrays each keeps its rows as a view."""
    if len(linears) == 1:
        return linears[0]
    joined = copy.copy(linears[0])
    ends = np.cumsum([linear.weight.shape[0] for linear in linears])[:-1].tolist()
    for name in linears[0]:
        joined[name] = whole = mx.concatenate([linear[name] for linear in linears])
        for linear, part in zip(linears, mx.split(whole, ends), strict=True):
            linear[name] = part
        mx.eval(whole, [linear[name] for linear in linears])
    return joined
