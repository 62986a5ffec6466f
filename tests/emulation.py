"""Metal's 16-bit and TF32 arithmetic on the CPU: MLX's products, rounded as Metal's kernels round.

MLX's own 16-bit products on the CPU are slow and give every row the same bits whatever stands
beside it, so they cannot show what a GPU's rounding does. Here a product is computed in float32 by
the BLAS and rounded once, as Metal's kernels do with their float32 accumulators. Below `limit` rows
a quantised product uses the exact weights (`qmv`); from there on it uses weights rounded to 16 bits
(`qmm` dequantises into 16-bit memory). The fused attention keeps scores in float32. With `tf32` the
inputs of float32 products of several rows lose all but 10 bits of their mantissa, as on an M5. The
kinds of error are Metal's; the bits are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from localrl.backend import mx

LIMITS = (6, 10, 14, 33)
"""Rows from which Metal's quantised products round their weights, by chip and size of the layer."""


@contextmanager
def metal(*, limit: int = LIMITS[0], tf32: bool = False) -> Iterator[None]:
    """Within this context MLX's products round as Metal's do."""
    products = _Products(limit, tf32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "matmul", products.matmul)
        patch.setattr(mx.array, "__matmul__", lambda a, b: products.matmul(a, b))
        patch.setattr(mx, "addmm", products.addmm)
        patch.setattr(mx, "quantized_matmul", products.quantized)
        patch.setattr(mx.fast, "scaled_dot_product_attention", products.attention)
        yield


class _Products:
    """The products of one emulated device; dequantised weights are kept while it exists."""

    def __init__(self, limit: int, tf32: bool) -> None:
        self._limit, self._tf32 = limit, tf32
        self._dense: dict[tuple[int, Any], tuple[mx.array, mx.array]] = {}
        self._matmul, self._attend = mx.matmul, mx.fast.scaled_dot_product_attention
        self._addmm = mx.addmm

    def matmul(self, a: mx.array, b: mx.array, **_: Any) -> mx.array:
        kind = _result(a, b)
        rows = a.size // a.shape[-1]
        product = self._matmul(self._input(a, rows), self._input(b, rows))
        return product.astype(kind)

    def addmm(
        self, c: mx.array, a: mx.array, b: mx.array, alpha: float = 1.0, beta: float = 1.0, **_: Any
    ) -> mx.array:
        kind, rows = _result(_result(c, a), b), a.size // a.shape[-1]
        a, b = self._input(a, rows), self._input(b, rows)
        return self._addmm(c.astype(mx.float32), a, b, alpha, beta).astype(kind)

    def quantized(self, x: mx.array, w: mx.array, /, scales: mx.array, **how: Any) -> mx.array:
        biases = how.get("biases")
        kind = x.dtype
        for array in (scales, biases):
            if array is not None and mx.issubdtype(array.dtype, mx.floating):
                kind = _result(kind, array)
        rows = x.size // x.shape[-1]
        rounded = rows >= self._limit and kind != mx.float32
        dense = self._weights(w, scales, kind if rounded else mx.float32, how)
        if how.get("transpose", True):
            dense = dense.T
        return self._matmul(self._input(x, rows), self._input(dense, rows)).astype(kind)

    def attention(self, q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
        kind, rows = q.dtype, q.shape[2]
        mask = how.get("mask")
        if isinstance(mask, mx.array) and mx.issubdtype(mask.dtype, mx.floating):
            how["mask"] = mask.astype(mx.float32)
        q, k, v = (self._input(array, rows) for array in (q, k, v))
        return self._attend(q, k, v, **how).astype(kind)

    def _input(self, array: mx.array, rows: int) -> mx.array:
        if array.dtype == mx.float32 and self._tf32 and rows > 1:
            return _tf32(array)
        return array.astype(mx.float32)

    def _weights(self, w: mx.array, scales: mx.array, kind: Any, how: dict[str, Any]) -> mx.array:
        """The dequantised weights in float32, rounded to `kind` before."""
        key = id(w), kind
        if key not in self._dense or self._dense[key][0] is not w:
            biases = how.get("biases")
            exact = mx.dequantize(
                w,
                scales.astype(mx.float32),
                None if biases is None else biases.astype(mx.float32),
                **{name: how[name] for name in ("group_size", "bits", "mode") if name in how},
            )
            dense = exact.astype(kind).astype(mx.float32)
            mx.eval(dense)
            self._dense[key] = w, dense
        return self._dense[key][1]


def _result(a: Any, b: Any) -> Any:
    """The dtype of a product of two arrays or dtypes: float32 unless both have the same 16 bits."""
    kinds = {getattr(one, "dtype", one) for one in (a, b)}
    return kinds.pop() if len(kinds) == 1 else mx.float32


@mx.custom_function
def _tf32(x: mx.array) -> mx.array:
    """Round float32 to a mantissa of 10 bits, to nearest, ties to even."""
    bits = x.view(mx.uint32)
    bits = bits + mx.array(0xFFF, mx.uint32) + ((bits >> 13) & 1)
    return (bits & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)


@_tf32.vjp
def _tf32_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent
