"""Writing a GGUF file, one tensor at a time, with llama.cpp's own `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from localrl.errors import ConfigError
from localrl.gguf.reader import Tensor
from localrl.gguf.types import TENSOR_TYPES, TensorType

_TYPES = {form.name: form for form in TENSOR_TYPES.values()}
MATRICES = {8: _TYPES["Q8_0"], 16: _TYPES["F16"]}
"""Tensor types of written matrices, by bits."""
FILE_TYPES = {8: 7, 16: 1}
"""Values of `general.file_type` for files with mostly such tensors, by bits."""
PADDING = 32
"""Alignment of tensors in bytes."""

Metadata = Mapping[str, Any]
"""Keys and values: bool, int (stored as uint32), float (float32), str, or lists of one type."""


def plan_tensors(shapes: Mapping[str, tuple[int, ...]], bits: int) -> dict[str, Tensor]:
    """Plan the tensors of a file by GGUF name: matrices in `bits` bits, the rest in float32.

    Q8_0 has blocks of 32 numbers: a matrix whose row length is not a multiple of 32 becomes F16.
    """
    planned, offset = {}, 0
    for name, shape in shapes.items():
        form = _form(shape, bits)
        nbytes = prod(shape) // form.block * form.bytes
        planned[name] = Tensor(name, shape, form, offset, nbytes)
        offset += -(-nbytes // PADDING) * PADDING
    return planned


def _form(shape: tuple[int, ...], bits: int) -> TensorType:
    if len(shape) == 1:
        return _TYPES["F32"]
    wished = MATRICES[bits]
    return wished if shape[-1] % wished.block == 0 else _TYPES["F16"]


def write_file(
    path: Path,
    architecture: str,
    metadata: Metadata,
    tensors: Mapping[str, Tensor],
    values: Callable[[Tensor], np.ndarray],
) -> float:
    """Write a file; return the relative rounding error over all matrices.

    The error is |written - given| / |given|. values: returns a tensor's numbers in float32; called
    in order, one tensor at a time.

    Raises: ConfigError if a number does not fit its type, or without the gguf package; OSError.
    """
    gguf = need_package()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors.values():
        kind = gguf.GGMLQuantizationType[tensor.type.name]
        shape, form = tensor.shape, np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, shape, form, tensor.nbytes, raw_dtype=kind)
    error = norm = 0.0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            given = values(tensor)
            packed = _packed(gguf, tensor, given)
            if given.ndim > 1:
                kept = gguf.dequantize(packed, gguf.GGMLQuantizationType[tensor.type.name])
                error += _square(kept - given)
                norm += _square(given)
            writer.write_tensor_data(packed)
    finally:
        if writer.fout is not None:
            writer.close()
    return (error / norm) ** 0.5 if norm else 0.0


def need_package() -> Any:
    """Import the gguf package.

    Raises: ConfigError if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "Writing GGUF files needs the gguf package: pip install 'localrl[gguf]'."
        ) from None
    return gguf


def _packed(gguf: Any, tensor: Tensor, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        if tensor.type.name == "Q8_0":
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            numbers = packed.reshape(-1, tensor.type.bytes)[:, :2].copy().view("<f2")  # scales
        else:
            numbers = packed = values.astype({"F16": "<f2", "F32": "<f4"}[tensor.type.name])
    if not np.isfinite(numbers).all():
        largest = float(np.abs(values).max())
        raise ConfigError(
            f"{tensor.name} has numbers up to {largest:g}, which do not fit into "
            f"{tensor.type.name}; GGUF cannot be written."
        )
    return packed


def _square(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
