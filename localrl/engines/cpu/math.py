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
from localrl.engines.cpu.buffers import columns, like
from localrl.engines.cpu.kernel_choice import current, steps

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
        if (c := steps()) is not None:
            c.norm(np.ascontiguousarray(x), self.weight, found, self.eps)
            return found
        squares = np.einsum("...ib,...ib->...b", x, x)
        factor = 1 / np.sqrt(squares / np.float32(x.shape[-2]) + np.float32(self.eps))
        np.multiply(x, factor[..., None, :], out=found)
        found *= self.weight
        return found

    def back(self, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Slope by x, from that by what was made of it; writes over the latter."""
        if (c := steps()) is not None:
            c.norm_back(np.ascontiguousarray(x), self.weight, slope, self.eps)
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
    """The place of one layer's low-rank change in those of its `Linears`."""

    ranks: slice
    """Its own among the ranks of all."""
    scale: float


@dataclass(frozen=True, eq=False)
class Linears:
    """Linear layers of one input as one matrix, with their adapters.

    One product reads each weight once, and fills the threads better than two or three small ones.
    """

    weight: np.ndarray
    """(out of all, in)"""
    places: tuple[slice, ...]
    """The outputs of each layer among those of all."""
    bias: np.ndarray | None = None
    """(out of all, 1)"""
    down: np.ndarray | None = None
    """(ranks of all, in); None without adapters."""
    up: np.ndarray | None = None
    """(out of all, ranks of all), times the scale; 0 between one layer and another's ranks."""
    adapters: tuple[Adapter | None, ...] = ()

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """Columns (in, B) to columns (out, B) of each layer."""
        y = self._times(x)
        if self.bias is not None:
            y += self.bias
        return [y[place] for place in self.places]

    def _times(self, x: np.ndarray) -> np.ndarray:
        if self.down is None or self.up is None:
            return times(self.weight, x)
        c, n = steps(), x.shape[1]
        if c is not None and current().takes(n):
            y = columns((len(self.weight), n))
            c.linear(self.weight, self.down, self.up, x, y)
            return y
        y = times(self.weight, x)
        add_times(self.up, times(self.down, x), y)
        return y

    def back(
        self, x: np.ndarray, slopes: Sequence[np.ndarray], further: bool = True
    ) -> tuple[np.ndarray | None, list[Pair]]:
        """Slope by x, if it is wanted `further`; and by each adapter's lora_a and lora_b.

        slopes: by what was made of x, (out, B) each.
        """
        found: np.ndarray | None = None
        if further:
            found = times(self.weight[self.places[0]].T, slopes[0])
            for place, slope in zip(self.places[1:], slopes[1:], strict=True):
                add_times(self.weight[place].T, slope, found)
        if self.down is None or self.up is None:
            return found, []
        low, by_low = times(self.down, x), np.empty((len(self.down), x.shape[1]), np.float32)
        ups: list[np.ndarray] = []
        for adapter, place, slope in zip(self.adapters, self.places, slopes, strict=True):
            if adapter is not None:
                mine = np.ascontiguousarray(self.up[place, adapter.ranks])
                by_low[adapter.ranks] = times(mine.T, slope)
                ups.append(np.float32(adapter.scale) * times(low[adapter.ranks], slope.T))
        if found is not None:
            add_times(self.down.T, by_low, found)
        downs = times(x, by_low.T).T
        ranks = [adapter.ranks for adapter in self.adapters if adapter is not None]
        return found, [(downs[mine].T, up) for mine, up in zip(ranks, ups, strict=True)]


def times(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """a @ b, for matrices (m, k) and (k, n)."""
    found = columns((len(a), b.shape[1])) if out is None else out
    if kernels is None or not found.size or not a.size:
        return np.matmul(a, b, out=found)
    kernels.matmul(a, b, found, False, False)
    return found


def add_times(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Add a @ b to `out`."""
    if kernels is None or not out.size or not a.size:
        out += a @ b
    else:
        kernels.matmul(a, b, out, True, False)


def rows_times(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(weight @ x).T for columns x (k, n): rows (n, m)."""
    if kernels is None or not x.size:
        return np.ascontiguousarray(np.matmul(weight, x).T)
    found = columns((x.shape[1], len(weight)))
    kernels.matmul(weight, x, found, False, True)
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), elementwise."""
    with np.errstate(over="ignore"):  # e ** 89 is inf, and 1 / inf the 0 that it should be
        found = np.negative(x, out=like(x))
        np.exp(found, out=found)
    found += 1
    return np.divide(1, found, out=found)


def swiglu(gate: np.ndarray, x: np.ndarray) -> np.ndarray:
    """silu(gate) * x, elementwise (Shazeer 2020, arXiv 2002.05202)."""
    if (c := steps()) is not None:
        found = like(gate)
        c.swiglu(gate, x, found)
        return found
    found = sigmoid(gate)
    found *= gate
    found *= x
    return found


def swiglu_back(gate: np.ndarray, x: np.ndarray, slope: np.ndarray) -> Pair:
    """Slopes by gate and x, from that by the product; writes over the latter."""
    if (c := steps()) is not None:
        by_gate = like(gate)
        c.swiglu_back(gate, x, slope, by_gate)
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
    x.take(partners, axis=1, out=found, mode="wrap")  # "raise" would buffer it
    found *= tables[1]
    found += np.multiply(x, tables[0], out=like(x))
    return found


def softmax(scores: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Over the last axis of scores (R, h, .., T), and writes over them.

    hidden: (1 or R, 1, L, T), is added first; each of h has every L of its rows in turn.
    """
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
    slope -= within
    slope *= weights
    slope *= np.float32(scale)
    return slope
