"""Conversion of GGUF tensors to the arrays that MLX computes with.

MLX's affine numbers are q * scale + bias, with q an unsigned integer of a few bits, and one scale
and one bias per group of 32. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have this form and are converted
without loss: the integers unchanged, and float16 scales and biases that follow exactly. Q4_K and
Q5_K have this form too, but their scales are products, which float16 rounds. All other types are
dequantised by the `gguf` package and requantised to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.errors import ConfigError
from localrl.gguf.reader import GGUF, Tensor, refused
from localrl.gguf.types import TensorType

GROUP = 32
"""Number of values that share a scale."""
ANEW_BITS = 8
"""Bits of a requantised number; 4 would add as much rounding error as the file already has."""
CHUNK = 1 << 22
"""Number of values dequantised at once."""


@dataclass(frozen=True)
class Affine:
    """Numbers of the form q * scale + bias."""

    integers: np.ndarray
    """(groups, 32) uint8."""
    scales: np.ndarray
    """(groups,) float32, the same as for biases."""
    biases: np.ndarray


@dataclass(frozen=True)
class Converted:
    """A tensor in MLX's form."""

    arrays: dict[str, mx.array]
    """`weight`, plus `scales` and `biases` if quantised; rows are those of the tensor."""
    bits: int = 0
    """Bits of a quantised number; 0 for floats."""
    squared_error: float = 0.0
    """Sum of squared differences from the file's numbers."""
    squared_norm: float = 1.0
    """Sum of the file's squared numbers, set if there is a difference."""


def convert(file: GGUF, tensor: Tensor) -> Converted:
    """Convert a tensor to MLX's form: floats unchanged, blocks as affine numbers in groups of 32.

    Raises: ConfigError if a number is not finite or the type cannot be read; the message says what
    to install if that would help.
    """
    if tensor.type.name in _FLOATS:
        return Converted({"weight": _floats(file, tensor)})
    if tensor.type.name not in _AFFINE and tensor.type.block < GROUP:
        raise refused(file.path, f"the tensor {tensor.name!r:.80} has the type {tensor.type.name}")
    rows = max(1, CHUNK // tensor.shape[-1])
    raw = file.raw(tensor)
    parts = [_part(file, tensor, raw[i : i + rows]) for i in range(0, len(raw), rows)]
    names = parts[0].arrays
    arrays = {name: mx.concatenate([part.arrays[name] for part in parts]) for name in names}
    mx.eval(arrays)
    return Converted(
        arrays,
        parts[0].bits,
        sum(part.squared_error for part in parts),
        sum(part.squared_norm for part in parts),
    )


def bits_of(kind: TensorType) -> int:
    """Return the bits of a number after conversion; 0 for floats."""
    if kind.name in _AFFINE:
        return _AFFINE[kind.name][0]
    return 0 if kind.name in _FLOATS else ANEW_BITS


def is_lossless(kind: TensorType) -> bool:
    """Return True if numbers of the type are converted without loss."""
    return kind.name in _FLOATS or kind.name in _EXACT


_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def _floats(file: GGUF, tensor: Tensor) -> mx.array:
    raw = np.frombuffer(file.raw(tensor), np.uint8)
    found = mx.array(raw.view(_FLOATS[tensor.type.name]).reshape(tensor.shape))
    if tensor.type.name == "BF16":
        found = found.view(mx.bfloat16)
    if not mx.isfinite(found).all().item():
        raise _not_finite(file, tensor)
    return found


def _part(file: GGUF, tensor: Tensor, raw: np.ndarray) -> Converted:
    """Convert some rows of a tensor; raw: (rows, bytes per row)."""
    blocks = raw.reshape(-1, tensor.type.bytes)
    bits = bits_of(tensor.type)
    if tensor.type.name not in _AFFINE:
        values = _unpacked(tensor, raw).reshape(len(raw), -1)
        if not np.isfinite(values).all():
            raise _not_finite(file, tensor)
        return _quantised(values, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        found = _AFFINE[tensor.type.name][1](blocks)
        scales, biases = found.scales.astype(np.float16), found.biases.astype(np.float16)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise _not_finite(file, tensor)
    rows = len(raw)
    arrays = {
        "weight": mx.array(_packed(found.integers, bits).reshape(rows, -1)),
        "scales": mx.array(scales.reshape(rows, -1)),
        "biases": mx.array(biases.reshape(rows, -1)),
    }
    if tensor.type.name in _EXACT:
        return Converted(arrays, bits)
    exact = found.integers * found.scales[:, None] + found.biases[:, None]
    rounded = found.integers * scales[:, None].astype(np.float32)
    rounded += biases[:, None].astype(np.float32)
    return Converted(arrays, bits, _square(rounded - exact), _square(exact))


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of a few bits into uint32, the first in the lowest bits."""
    eights = integers.reshape(-1, 8)
    words = np.zeros(len(eights), "<u8")
    for place in range(8):
        words |= eights[:, place].astype("<u8") << np.uint64(bits * place)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1).view("<u4")


def _quantised(values: np.ndarray, bits: int) -> Converted:
    weight, scales, biases = mx.quantize(mx.array(values), group_size=GROUP, bits=bits)
    scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
    again = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=GROUP, bits=bits
    )
    error = _square(np.array(again) - values)
    arrays = {"weight": weight, "scales": scales, "biases": biases}
    return Converted(arrays, bits, error, _square(values))


def _unpacked(tensor: Tensor, raw: np.ndarray) -> np.ndarray:
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError:
        raise ConfigError(
            f"The tensor {tensor.name!r:.80} has the type {tensor.type.name}, which the gguf "
            "package reads: pip install 'localrl[gguf]', or use a file in Q4_0, Q4_K or Q8_0."
        ) from None
    try:
        return dequantize(raw, GGMLQuantizationType[tensor.type.name])
    except (KeyError, NotImplementedError):
        raise ConfigError(
            f"The tensor {tensor.name!r:.80} has the type {tensor.type.name}, which the installed "
            "gguf package cannot read. Use a file of another type."
        ) from None


def _square(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _not_finite(file: GGUF, tensor: Tensor) -> ConfigError:
    return refused(file.path, f"the tensor {tensor.name!r:.80} has numbers that are not finite")


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read the float16 at byte `at` of every block, as float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32)


def _nibbles(quads: np.ndarray) -> np.ndarray:
    """Return the low halves of the bytes, followed by their high halves."""
    return np.concatenate([quads & 15, quads >> 4], axis=-1)


def _fifth(bits: np.ndarray) -> np.ndarray:
    """Return 16 for each set bit; bits: (groups, 4) bytes, the first number in the lowest bit."""
    return np.unpackbits(bits, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> Affine:
    scales = _halves(blocks, 0)
    return Affine(_nibbles(blocks[:, 2:]), scales, -8 * scales)


def _q4_1(blocks: np.ndarray) -> Affine:
    return Affine(_nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: np.ndarray) -> Affine:
    scales = _halves(blocks, 0)
    return Affine(_nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6]), scales, -16 * scales)


def _q5_1(blocks: np.ndarray) -> Affine:
    integers = _nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8])
    return Affine(integers, _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: np.ndarray) -> Affine:
    scales = _halves(blocks, 0)
    return Affine(blocks[:, 2:] ^ 128, scales, -128 * scales)  # signed bytes plus 128


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack scales and biases (groups,) of Q4_K and Q5_K: 8 groups per block, 6 bits, 12 bytes."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, c & 15 | (a >> 6) << 4], axis=1)
    least = np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], axis=1)
    whole = _halves(blocks, 0)[:, None] * scales, -_halves(blocks, 2)[:, None] * least
    return whole[0].reshape(-1), whole[1].reshape(-1)


def _q4_k(blocks: np.ndarray) -> Affine:
    integers = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return Affine(integers.reshape(-1, GROUP), *_k_scales(blocks))


def _q5_k(blocks: np.ndarray) -> Affine:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, GROUP)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shifts & 1) << 4
    return Affine((low | high).reshape(-1, GROUP), *_k_scales(blocks))


_AFFINE: dict[str, tuple[int, Callable[[np.ndarray], Affine]]] = {
    "Q4_0": (4, _q4_0),
    "Q4_1": (4, _q4_1),
    "Q5_0": (5, _q5_0),
    "Q5_1": (5, _q5_1),
    "Q8_0": (8, _q8_0),
    "Q4_K": (4, _q4_k),
    "Q5_K": (5, _q5_k),
}
_EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
