"""Arithmetic of a transformer's block in NumPy, forward and back, on columns of states.

A state is a column, one for each token: for a few tokens the BLAS is up to twice as fast with the
weights first (`benchmarks/matmul.md`). What takes NumPy several passes is in C in `c/columns.h`,
and said once more here: for where that could not be built, and to test it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localrl.backend import kernels
from localrl.policy.array_room import columns, like

FEWER = 16
"""Columns up to which a product is faster when no matrix is packed for it; but for a single one."""

quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
"""Numbers of a model that diverges are looked for where they end up, in loss and adapters."""

Pair = tuple[np.ndarray, np.ndarray]
"""By an adapter's lora_a (in, rank) and lora_b (rank, out); or keys and values."""


@dataclass(frozen=True, eq=False)
class Norm:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) of columns (..., d, B)."""

    weight: np.ndarray
    """(d, 1)"""
    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        found = like(x)
        if kernels is not None:
            kernels.norm(np.ascontiguousarray(x), self.weight, found, self.eps)
            return found
        squares = np.einsum("...ib,...ib->...b", x, x)
        factor = 1 / np.sqrt(squares / np.float32(x.shape[-2]) + np.float32(self.eps))
        np.multiply(x, factor[..., None, :], out=found)
        found *= self.weight
        return found

    def back(self, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Slope by x, from that by what was made of it; writes over the latter."""
        if kernels is not None:
            kernels.norm_back(np.ascontiguousarray(x), self.weight, slope, self.eps)
            return slope
        size = np.float32(x.shape[-2])
        squares = np.einsum("...ib,...ib->...b", x, x)
        factor = 1 / np.sqrt(squares / size + np.float32(self.eps))
        slope *= self.weight
        along = np.einsum("...ib,...ib->...b", x, slope)
        slope *= factor[..., None, :]
        slope -= np.multiply(x, (along * factor**3 / size)[..., None, :], out=like(x))
        return slope


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank change of a linear layer."""

    place: slice
    """Which of the ranks of its `Linears` are its own."""
    up: np.ndarray
    """(out, rank), times the scale."""
    scale: float


@dataclass(frozen=True, eq=False)
class Linears:
    """Linear layers of one input, with their adapters."""

    weights: tuple[np.ndarray, ...]
    """(out, in) each."""
    biases: tuple[np.ndarray | None, ...]
    """(out, 1) each."""
    down: np.ndarray | None
    """(ranks of all, in); None without adapters."""
    adapters: tuple[Adapter | None, ...]

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """Columns (in, B) to columns (out, B) each."""
        low = x if self.down is None else self.down @ x
        found = []
        for weight, bias, adapter in zip(self.weights, self.biases, self.adapters, strict=True):
            y = times(weight, x)
            if bias is not None:
                y += bias
            if adapter is not None:
                y += adapter.up @ low[adapter.place]
            found.append(y)
        return found

    def back(
        self, x: np.ndarray, slopes: Sequence[np.ndarray], further: bool = True
    ) -> tuple[np.ndarray | None, list[Pair]]:
        """Slope by x, if it is wanted `further`; and by each adapter's lora_a and lora_b.

        slopes: by what was made of x, (out, B) each.
        """
        found: np.ndarray | None = None
        if further:
            found = times(self.weights[0].T, slopes[0])
            for weight, slope in zip(self.weights[1:], slopes[1:], strict=True):
                found += times(weight.T, slope)
        if self.down is None:
            return found, []
        low, by_low = self.down @ x, np.empty((len(self.down), x.shape[1]), np.float32)
        ups: list[np.ndarray] = []
        for adapter, slope in zip(self.adapters, slopes, strict=True):
            if adapter is not None:
                np.matmul(adapter.up.T, slope, out=by_low[adapter.place])
                ups.append(np.float32(adapter.scale) * (low[adapter.place] @ slope.T))
        if found is not None:
            found += self.down.T @ by_low
        downs = (x @ by_low.T).T
        places = [adapter.place for adapter in self.adapters if adapter is not None]
        return found, [(downs[place].T, up) for place, up in zip(places, ups, strict=True)]


def times(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """weight @ x."""
    shape = (*weight.shape[:-1], x.shape[-1])
    few = 1 < shape[-1] <= FEWER and weight.flags.c_contiguous
    if few and kernels is not None and kernels.WIDE:
        found = np.empty(shape, np.float32)
        kernels.product(weight, np.ascontiguousarray(x), found)
        return found
    return np.matmul(weight, x, out=columns(shape))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), elementwise."""
    with np.errstate(over="ignore"):  # e ** 89 is inf, and 1 / inf the 0 that it should be
        found = np.negative(x, out=like(x))
        np.exp(found, out=found)
    found += 1
    return np.divide(1, found, out=found)


def swiglu(gate: np.ndarray, x: np.ndarray) -> np.ndarray:
    """silu(gate) * x, elementwise (Shazeer 2020, arXiv 2002.05202)."""
    if kernels is not None:
        found = like(gate)
        kernels.swiglu(gate, x, found)
        return found
    found = sigmoid(gate)
    found *= gate
    found *= x
    return found


def swiglu_back(gate: np.ndarray, x: np.ndarray, slope: np.ndarray) -> Pair:
    """Slopes by gate and x, from that by the product; writes over the latter."""
    if kernels is not None:
        by_gate = like(gate)
        kernels.swiglu_back(gate, x, slope, by_gate)
        return by_gate, slope
    by_gate = sigmoid(gate)
    silu = np.multiply(by_gate, gate, out=like(gate))
    # With s the sigmoid, d silu / d gate = s (1 + gate (1 - s)) = s (1 - silu) + silu.
    by_gate *= np.subtract(1, silu, out=like(gate))
    by_gate += silu
    by_gate *= x
    by_gate *= slope
    slope *= silu
    return by_gate, slope


def turn(x: np.ndarray, partners: np.ndarray, tables: Pair) -> np.ndarray:
    """x * cosines + x[partners] * sines, for heads (h, d, B) and tables (d, B)."""
    found = like(x)
    if kernels is not None:
        kernels.turn(np.ascontiguousarray(x), *tables, found, partners)
        return found
    x.take(partners, axis=1, out=found, mode="wrap")  # "raise" would buffer it
    found *= tables[1]
    found += np.multiply(x, tables[0], out=like(x))
    return found


def softmax(scores: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Over the last axis of scores (R, h, .., T), and writes over them.

    hidden: (1 or R, 1, L, T), is added first; each of h has every L of its rows in turn.
    """
    if kernels is not None:
        kernels.softmax(scores) if hidden is None else kernels.softmax(scores, hidden)
        return scores
    if hidden is not None:
        rows = scores.reshape(len(scores), -1, *hidden.shape[2:])
        rows += hidden
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def softmax_back(
    weights: np.ndarray, within: np.ndarray, slope: np.ndarray, scale: float
) -> np.ndarray:
    """Slope by scores that were multiplied by `scale`, from that by the weights (.., T) they
    became; writes over the latter.

    within: for each softmax (.., 1) the sum of weights * slope.
    """
    if kernels is not None:
        kernels.softmax_back(weights, np.ascontiguousarray(within), slope, scale)
        return slope
    slope -= within
    slope *= weights
    slope *= np.float32(scale)
    return slope
