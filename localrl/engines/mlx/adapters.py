"""Adapted layers prepared for decoding: fewer kernels for those that receive the same input.

A decode step computes few positions, so launching kernels takes longer than the products in them.
Casting and scaling every adapter for every token, two products and an addition per layer would
launch three times as many as the model alone. Here they are cast and scaled once per update, and
layers with one input, such as those of queries, keys and values, begin together:

    (y1 y2 y3) = x (W1 W2 W3),   (p1 p2 p3) = x (A1 A2 A3),   then y1 + p1 B1 in one kernel ...

The frozen weights lie side by side in one array, of which each layer keeps its part as a view, so
they exist once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from localrl.backend import mx, nn
from localrl.policy.lora import LoRALinear

FORMAT = ("bits", "group_size", "mode")
"""Attributes in which quantised layers must agree to be computed together."""


@dataclass(frozen=True, eq=False)
class Siblings:
    """Adapted layers that receive the same input and hold weights of the same format."""

    layers: tuple[LoRALinear, ...]
    dtype: mx.Dtype
    """Dtype of their input."""
    frozen: FrozenLayers


class FrozenLayers:
    """The layers below the adapters of siblings."""

    def __init__(self, linears: Sequence[Any]) -> None:
        self._linears = linears

    @cached_property
    def joined(self) -> nn.Module:
        """One layer of them all, of whose arrays each keeps its rows as a view; made once."""
        linears = self._linears
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
    return tuple(
        Siblings(
            tuple(group.values()),
            inputs[key].dtype,
            FrozenLayers([layer.linear for layer in group.values()]),
        )
        for key, group in groups.items()
    )


def prepare(siblings: Iterable[Siblings]) -> None:
    """Prepare the layers whose adapters have changed since the last time."""
    made: list[mx.array] = []
    for group in siblings:
        if all(isinstance(n.prepared, _Part) and n.prepared.is_of(n) for n in group.layers):
            continue
        together = _Together(group)
        made.append(together.lora_a)
        outputs = inputs = 0
        for layer in group.layers:
            rank, width = layer.lora_b.shape
            columns = slice(outputs, outputs + width), slice(inputs, inputs + rank)
            layer.prepared = part = _Part(layer, together, *columns)
            made.append(part.lora_b)
            outputs, inputs = outputs + width, inputs + rank
    mx.eval(made)


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
    """The products that layers have in common, for the first of them called with an input."""

    def __init__(self, group: Siblings) -> None:
        self.dtype = group.dtype
        self.lora_a = mx.concatenate([n.lora_a.astype(group.dtype) for n in group.layers], axis=1)
        self._linear = group.frozen.joined
        self._layers = len(group.layers)
        self._x: mx.array | None = None
        self._products: tuple[mx.array, ...] = ()
        self._left = 0

    def __call__(self, x: mx.array) -> tuple[mx.array, ...]:
        """Return outputs (positions, sum of outputs) without adapters, and `x @ lora_a`."""
        if self._x is not x:
            flat = x.reshape(-1, x.shape[-1])
            self._x, self._products = x, (self._linear(flat), flat @ self.lora_a)
            self._left = self._layers
        products = self._products
        self._left -= 1
        if not self._left:  # a prefill's activations must not outlive it
            self._x, self._products = None, ()
        return products


class _Part:
    """One of several layers that begin together: see `Prepared`."""

    def __init__(
        self, layer: LoRALinear, together: _Together, outputs: slice, inputs: slice
    ) -> None:
        self.lora_b = (layer.scale * layer.lora_b).astype(together.dtype)
        self._source = (layer.lora_a, layer.lora_b, layer.scale)
        self._together = together
        self._outputs, self._inputs = outputs, inputs

    def is_of(self, layer: LoRALinear) -> bool:
        """Return True if the layer still holds these very arrays, which are never modified."""
        lora_a, lora_b, scale = self._source
        return layer.lora_a is lora_a and layer.lora_b is lora_b and layer.scale == scale

    def fits(self, layer: LoRALinear, x: mx.array) -> bool:
        """Return True if it was prepared from the layer's present weights, for such an input."""
        return x.dtype == self._together.dtype and self.is_of(layer)

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the layer."""
        y, product = self._together(x)
        y = mx.addmm(y[:, self._outputs], product[:, self._inputs], self.lora_b)
        return y.reshape(*x.shape[:-1], y.shape[-1])
