"""The number format of the frozen base.

On MLX's CPU backend a 4-bit product handles one row at a time, and bfloat16 or float16 activations
are ten to fifty times slower than float32 ones; a dense float32 product goes to the BLAS. On a GPU
quantised weights stay packed, and floats have 16 bits: `engines.floats` chooses which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from localrl.backend import mx, nn, tree_flatten, tree_unflatten
from localrl.errors import ConfigError
from localrl.policy.lora import is_experts
from localrl.utils.stored_formats import WAY_OUT


def to_float32(model: nn.Module) -> None:
    """Cast every floating-point parameter, including quantisation scales, to float32 in place."""
    cast_floats(model, mx.float32)


def cast_floats(model: nn.Module, dtype: mx.Dtype, *, only: mx.Dtype | None = None) -> None:
    """Cast every floating-point parameter, including quantisation scales, in place.

    only: leave other dtypes as they are. Arrays are cast one at a time, so only one exists in both
    forms; the largest first, while the others are still small.
    """
    waiting: Any = tree_flatten(model.parameters())
    waiting.sort(key=lambda named: named[1].nbytes)
    while waiting:
        name, array = waiting.pop()
        if mx.issubdtype(array.dtype, mx.floating) and (only is None or array.dtype == only):
            array = array.astype(dtype)
            model.update(tree_unflatten([(name, array)]))
        mx.eval(array)
    match_embeddings(model)


def check_weights(model: nn.Module) -> None:
    """Check that every layer's weight is floats, or packed with scales.

    Raises: ConfigError for one that is not: MLX would compute with its integers.
    """
    for path, module in model.named_modules():
        weight = module.get("weight")
        if weight is None or "scales" in module or mx.issubdtype(weight.dtype, mx.floating):
            continue
        raise ConfigError(
            f"The layer {path} was loaded as {str(weight.dtype).removeprefix('mlx.core.')}, which "
            f"is neither floats nor a quantisation that MLX knows. {WAY_OUT}"
        )


def match_embeddings(model: nn.Module) -> None:
    """Let packed embeddings return the model's floats where MLX returns bfloat16, in place.

    That is in all modes but affine, whose scales are bytes. bfloat16 among float16 would make MLX
    compute in float32.
    """
    packed = [
        (path, m)
        for path, m in model.named_modules()
        if isinstance(m, nn.QuantizedEmbedding) and m.mode != "affine"
    ]
    dtype = _usual_float(model) if packed else mx.float32
    matched = [(path, PackedEmbedding(module, dtype)) for path, module in packed]
    model.update_modules(tree_unflatten(matched))


class PackedEmbedding(nn.QuantizedEmbedding):
    """A packed embedding that returns floats of this dtype."""

    def __init__(self, packed: nn.QuantizedEmbedding, dtype: mx.Dtype) -> None:
        nn.Module.__init__(self)
        for name in ("group_size", "bits", "mode", "num_embeddings", "dims", "weight", "scales"):
            setattr(self, name, getattr(packed, name))
        self.biases = None
        self.dtype = dtype
        self.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.dequantize(
            self.weight[tokens],
            self.scales[tokens],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=self.dtype,
        )


def _usual_float(model: nn.Module) -> mx.Dtype:
    """The dtype of most of the model's floats."""
    parameters: Any = tree_flatten(model.parameters())
    counts: dict[mx.Dtype, int] = {}
    for _, array in parameters:
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] = counts.get(array.dtype, 0) + array.size
    return max(counts, key=lambda dtype: counts[dtype], default=mx.float32)


def float_kinds(model: nn.Module) -> set[mx.Dtype]:
    """Return the dtypes of the floating-point parameters, including quantisation scales."""
    parameters: Any = tree_flatten(model.parameters())
    return {a.dtype for _, a in parameters if mx.issubdtype(a.dtype, mx.floating)}


@contextmanager
def float32_activations(model: nn.Module) -> Iterator[None]:
    """Within this context a model with 16-bit floats computes in float32; weights stay as they are.

    Embeddings return float32, and MLX casts the other operand of every later product, one layer
    at a time. Self-checks run like this: in 16 bits, rounding hides all but gross errors.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    ]
    if float_kinds(model) <= {mx.float32}:
        found = []
    model.update_modules(tree_unflatten([(path, _Float32Embedding(m)) for path, m in found]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(found))


class _Float32Embedding(nn.Module):
    """A stand-in for an embedding that returns float32; all else is the embedding's own."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self["embedding"] = embedding  # setattr would look the name up first

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else getattr(self["embedding"], name)

    def __call__(self, tokens: mx.array) -> mx.array:
        layer = self["embedding"]
        if not isinstance(layer, nn.QuantizedEmbedding) or layer.mode != "affine":
            return layer(tokens).astype(mx.float32)
        packed, scales, biases = (layer[name][tokens] for name in ("weight", "scales", "biases"))
        return mx.dequantize(
            packed,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=layer.group_size,
            bits=layer.bits,
        )


def dequantise(model: nn.Module, *, as_float32: bool) -> None:
    """Replace quantised linear and embedding layers by dense ones with the same values, in place.

    as_float32: compute the values in float32, regardless of the scales' dtype. Layers are converted
    one at a time, so only one exists in both forms; the largest first.
    """
    waiting = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    ]
    waiting.sort(key=lambda named: named[1].weight.nbytes)
    usual = _usual_float(model)
    while waiting:
        path, module = waiting.pop()
        if as_float32:
            module.set_dtype(mx.float32)
        dtype = None if module.mode == "affine" else usual
        dense = dense_layer(module, weight_of(module, mx.float32 if as_float32 else dtype))
        model.update_modules(tree_unflatten([(path, dense)]))
        mx.eval(dense.parameters())


def quantise(model: Any, bits: int) -> None:
    """Quantise the layers of the model in place, as mlx-lm's conversion does.

    Groups have 64 weights, or 32 if a layer's width is not a multiple of 64. A layer whose width is
    a multiple of neither is left as it is. Layers are quantised one at a time, so only one exists
    in both forms.

    Raises: ConfigError if the model is already quantised to other bits, or no layer can be.
    """
    found = {module.bits for _, module in model.named_modules() if hasattr(module, "bits")}
    if found == {bits}:
        return
    if found:
        held = ", ".join(map(str, sorted(found)))
        raise ConfigError(
            f"The model is already quantised to {held} bits and cannot be quantised to {bits} "
            "without further loss. Remove --quantize, or choose an unquantised model."
        )
    family = getattr(model, "quant_predicate", None)

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        size = _group_size(module)
        wish = size is not None and (family is None or family(path, module))
        if isinstance(wish, dict):
            return {**wish, "group_size": size}
        return {"group_size": size, "bits": bits} if wish else False

    nn.quantize(model, bits=bits, class_predicate=choose)
    quantised = [module for module in model.modules() if hasattr(module, "bits")]
    if not quantised:
        raise ConfigError("No layer has a width that is a multiple of 32. Remove --quantize.")
    for module in quantised:
        mx.eval(module.parameters())


def _group_size(module: Any) -> int | None:
    """Return how many weights share a scale, or None for a layer that cannot be quantised."""
    if not hasattr(module, "to_quantized"):
        return None
    width = module.weight.shape[-1]
    return next((size for size in (64, 32) if width % size == 0), None)


def weight_of(module: Any, dtype: mx.Dtype | None = None) -> mx.array:
    """Compute the weight of a linear layer, an embedding or stacked experts as a new dense array.

    dtype: to compute it in; None: that of the floats in the module, else bfloat16.
    """
    if "scales" not in module:
        return module.weight.astype(dtype or module.weight.dtype)
    scales = _floats_as(module.scales, dtype)
    biases = _floats_as(module.biases, dtype) if "biases" in module else None
    options = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    if "global_scale" not in module:
        return mx.dequantize(module.weight, scales, biases, dtype=dtype, **options)
    experts = zip(module.weight, scales, module.global_scale, strict=True)
    return mx.stack(
        [mx.dequantize(w, s, global_scale=g, dtype=dtype, **options) for w, s, g in experts]
    )


def _floats_as(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Cast floats; scales that are bytes stay as they are."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(dtype)


def dense_layer(module: Any, weight: mx.array) -> Any:
    """Make the dense layer of the module's kind with this weight, and the module's bias."""
    from mlx_lm.models.switch_layers import SwitchLinear

    dense: Any
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        dense = nn.Embedding(1, 1)
    elif is_experts(module):
        dense = SwitchLinear(1, 1, 1, bias="bias" in module)
    else:
        dense = nn.Linear(1, 1, bias="bias" in module)
    dense.weight = weight
    if "bias" in module:
        dense.bias = module.bias
    return dense
