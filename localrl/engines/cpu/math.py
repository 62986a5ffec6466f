"""Arithmetic of a transformer block in NumPy, forward and backward, on columns of states.

Hidden states are columns, one for each token: for a few tokens the BLAS is up to twice as fast with
the weights first (`benchmarks/matmul.md`). Operations that take NumPy several passes are also
written in C in `c/columns.h`; the versions here are used if that could not be built, and to test
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localrl.backend import kernels
from localrl.engines.cpu.buffers import empty_columns, empty_like
from localrl.engines.cpu.kernel_choice import current, steps

ignore_overflow = np.errstate(over="ignore", invalid="ignore", divide="ignore")
"""Silences overflow: a diverging model's infinities are caught later, in loss and adapters."""

KV = tuple[np.ndarray, np.ndarray]
"""Keys and values."""
LoraGrads = tuple[np.ndarray, np.ndarray]
"""Gradients w.r.t. an adapter's lora_a (in, rank) and lora_b (rank, out)."""
RopeTables = tuple[np.ndarray, np.ndarray]
"""Cosines and sines (head_dim, B)."""


@dataclass(frozen=True, eq=False)
class Norm:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) of columns (..., d, B)."""

    weight: np.ndarray
    """Weight (d, 1)."""
    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        found = empty_like(x)
        if (c := steps()) is not None:
            c.norm(np.ascontiguousarray(x), self.weight, found, self.eps)
            return found
        squares = np.einsum("...ib,...ib->...b", x, x)
        factor = 1 / np.sqrt(squares / np.float32(x.shape[-2]) + np.float32(self.eps))
        np.multiply(x, factor[..., None, :], out=found)
        found *= self.weight
        return found

    def back(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """Gradient w.r.t. x, given `grad` w.r.t. the output; overwrites `grad`."""
        if (c := steps()) is not None:
            c.norm_back(np.ascontiguousarray(x), self.weight, grad, self.eps)
            return grad
        size = np.float32(x.shape[-2])
        squares = np.einsum("...ib,...ib->...b", x, x)
        factor = 1 / np.sqrt(squares / size + np.float32(self.eps))
        grad *= self.weight
        along = np.einsum("...ib,...ib->...b", x, grad)
        grad *= factor[..., None, :]
        grad -= np.multiply(x, (along * factor**3 / size)[..., None, :], out=empty_like(x))
        return grad


@dataclass(frozen=True, eq=False)
class AdapterSlice:
    """One layer's adapter within a `FusedLinear`."""

    ranks: slice
    """Its rows of `lora_a` and columns of `lora_b`."""
    scale: float


@dataclass(frozen=True, eq=False)
class FusedLinear:
    """Linear layers with the same input, fused into one matrix, with their adapters.

    One product reads each weight once and uses the threads better than two or three small ones.
    """

    weight: np.ndarray
    """Weights (out of all layers, in)."""
    places: tuple[slice, ...]
    """Rows of each layer's outputs among those of all."""
    bias: np.ndarray | None = None
    """Biases (out of all layers, 1); None if no layer has one."""
    lora_a: np.ndarray | None = None
    """Stacked lora_a (ranks of all layers, in); None without adapters."""
    lora_b: np.ndarray | None = None
    """Block-diagonal lora_b (out of all layers, ranks of all layers), times the scale."""
    adapters: tuple[AdapterSlice | None, ...] = ()

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """Map columns (in, B) to columns (out, B) of each layer."""
        y = self._product(x)
        if self.bias is not None:
            y += self.bias
        return [y[place] for place in self.places]

    def _product(self, x: np.ndarray) -> np.ndarray:
        if self.lora_a is None or self.lora_b is None:
            return matmul(self.weight, x)
        c, n = steps(), x.shape[1]
        if c is not None and current().takes(n):
            y = empty_columns((len(self.weight), n))
            c.linear(self.weight, self.lora_a, self.lora_b, x, y)
            return y
        y = matmul(self.weight, x)
        add_matmul(self.lora_b, matmul(self.lora_a, x), y)
        return y

    def back(
        self, x: np.ndarray, grads: Sequence[np.ndarray], need_grad_x: bool = True
    ) -> tuple[np.ndarray | None, list[LoraGrads]]:
        """Gradients w.r.t. x (None unless `need_grad_x`) and each adapter's lora_a and lora_b.

        grads: gradients w.r.t. each layer's output, (out, B).
        """
        found: np.ndarray | None = None
        if need_grad_x:
            found = matmul(self.weight[self.places[0]].T, grads[0])
            for place, grad in zip(self.places[1:], grads[1:], strict=True):
                add_matmul(self.weight[place].T, grad, found)
        if self.lora_a is None or self.lora_b is None:
            return found, []
        low, grad_low = matmul(self.lora_a, x), np.empty((len(self.lora_a), x.shape[1]), np.float32)
        ups: list[np.ndarray] = []
        for adapter, place, grad in zip(self.adapters, self.places, grads, strict=True):
            if adapter is not None:
                mine = np.ascontiguousarray(self.lora_b[place, adapter.ranks])
                grad_low[adapter.ranks] = matmul(mine.T, grad)
                ups.append(np.float32(adapter.scale) * matmul(low[adapter.ranks], grad.T))
        if found is not None:
            add_matmul(self.lora_a.T, grad_low, found)
        downs = matmul(x, grad_low.T).T
        ranks = [adapter.ranks for adapter in self.adapters if adapter is not None]
        return found, [(downs[mine].T, up) for mine, up in zip(ranks, ups, strict=True)]


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Compute a @ b for matrices (m, k) and (k, n)."""
    found = empty_columns((len(a), b.shape[1])) if out is None else out
    if kernels is None or not found.size or not a.size:
        return np.matmul(a, b, out=found)
    kernels.matmul(a, b, found, False, False)
    return found


def add_matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Add a @ b to `out`."""
    if kernels is None or not out.size or not a.size:
        out += a @ b
    else:
        kernels.matmul(a, b, out, True, False)


def matmul_rows(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Compute (weight @ x).T for columns x (k, n): rows (n, m)."""
    if kernels is None or not x.size:
        return np.ascontiguousarray(np.matmul(weight, x).T)
    found = empty_columns((x.shape[1], len(weight)))
    kernels.matmul(weight, x, found, False, True)
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + exp(-x)), elementwise."""
    with np.errstate(over="ignore"):  # e ** 89 overflows to inf, and 1 / inf is 0, as it should be
        found = np.negative(x, out=empty_like(x))
        np.exp(found, out=found)
    found += 1
    return np.divide(1, found, out=found)


def swiglu(gate: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Compute silu(gate) * x, elementwise (Shazeer 2020, arXiv 2002.05202)."""
    if (c := steps()) is not None:
        found = empty_like(gate)
        c.swiglu(gate, x, found)
        return found
    found = sigmoid(gate)
    found *= gate
    found *= x
    return found


def swiglu_back(gate: np.ndarray, x: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients w.r.t. gate and x, given `grad` w.r.t. the output; overwrites `grad`."""
    if (c := steps()) is not None:
        grad_gate = empty_like(gate)
        c.swiglu_back(gate, x, grad, grad_gate)
        return grad_gate, grad
    grad_gate = sigmoid(gate)
    silu = np.multiply(grad_gate, gate, out=empty_like(gate))
    # With s the sigmoid, d silu / d gate = s (1 + gate (1 - s)) = s (1 - silu) + silu.
    grad_gate *= np.subtract(1, silu, out=empty_like(gate))
    grad_gate += silu
    grad_gate *= x
    grad_gate *= grad
    grad *= silu
    return grad_gate, grad


def apply_rope(x: np.ndarray, pair_index: np.ndarray, tables: RopeTables) -> np.ndarray:
    """Compute x * cosines + x[pair_index] * sines, for heads (h, d, B) and tables (d, B)."""
    found = empty_like(x)
    x.take(pair_index, axis=1, out=found, mode="wrap")  # "raise" would buffer it
    found *= tables[1]
    found += np.multiply(x, tables[0], out=empty_like(x))
    return found


def softmax(scores: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Softmax over the last axis of scores (R, h, .., T), in place.

    hidden (1 or R, 1, L, T) is added first, broadcast over heads.
    """
    if hidden is not None:
        rows = scores.reshape(len(scores), -1, *hidden.shape[2:])
        rows += hidden
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def softmax_back(
    weights: np.ndarray, within: np.ndarray, grad: np.ndarray, scale: float
) -> np.ndarray:
    """Gradient w.r.t. scores that were multiplied by `scale`, given `grad` w.r.t. their softmax
    weights (.., T); overwrites `grad`.

    within: sum of weights * grad for each softmax (.., 1).
    """
    grad -= within
    grad *= weights
    grad *= np.float32(scale)
    return grad
