"""Counts the kernels that MLX would launch on a GPU for a graph, without a GPU.

Each primitive of the graph is one kernel, except views, which launch none. Operations that are one
kernel on a GPU but many on the CPU (`mx.fast`, mlx-lm's compiled activation) are replaced while the
graph is built by one operation of the same shape. Copies that a kernel makes of an input that is
not contiguous are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from localrl.backend import mx

VIEWS = {
    "AsStrided",
    "Broadcast",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
}
"""Primitives that share their input's memory."""


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Within this context, operations with a kernel of their own on a GPU are one primitive."""
    family = __import__(type(model).__module__, fromlist=["swiglu"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: _one(x, weight))
        patch.setattr(mx.fast, "rope", _rope)
        patch.setattr(mx.fast, "scaled_dot_product_attention", _attention)
        if hasattr(family, "swiglu"):
            patch.setattr(family, "swiglu", _one)
        yield


def kernels(arrays: list[mx.array], folder: Path) -> Counter[str]:
    """Count the primitives that launch a kernel, by name, in the graph of these arrays."""
    file = folder / "graph.dot"
    mx.export_to_dot(str(file), arrays)
    names = re.findall(r'^\{ \d+ \[label ="(\w+)"', file.read_text(), re.MULTILINE)
    return Counter(name for name in names if name not in VIEWS)


def _one(x: mx.array, *others: Any) -> mx.array:
    """One kernel with the shape of `x` that needs the others."""
    return mx.depends([mx.abs(x)], [array for array in others if isinstance(array, mx.array)])[0]


def _rope(x: mx.array, *args: Any, offset: Any, **options: Any) -> mx.array:
    return _one(x, offset)


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any
) -> mx.array:
    return _one(q, k, v, mask)
