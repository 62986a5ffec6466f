"""Changing the number format of a base: the values, and the memory that it takes meanwhile."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import tiny

from localrl.backend import mx, nn, tree_flatten
from localrl.engines.open import make_policy
from localrl.policy.model import load_model
from localrl.policy.precision import dequantise, to_float32

SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 768, "vocab_size": 512}
LARGEST = 4 * 256 * 768
"""Bytes of a layer as a float32 matrix."""


def in_16_bits(folder: Path) -> None:
    file = str(folder / "model.safetensors")
    stored = {
        name: array.astype(mx.bfloat16) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in mx.load(file).items()
    }
    mx.eval(stored)
    mx.save_safetensors(file, stored)


@pytest.fixture(scope="module", params=[4, None], ids=["4 bits", "16 bits"])
def folder(tmp_path_factory, request):
    made = tiny.make_folder(tmp_path_factory.mktemp("m") / "model", bits=request.param, **SIZES)
    in_16_bits(made)
    return made


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def as_numbers(array: mx.array) -> np.ndarray:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return np.array(array.astype(mx.float32) if floating else array)


@pytest.mark.parametrize("quantize", [0, 4])
@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_loading_takes_the_final_weights_and_one_layer(folder, quantize, for_cpu, dense):
    gc.collect()  # models of other tests
    mx.clear_cache()  # a buffer that is used again may be larger than what is in it
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loaded = load_model(folder, quantize=quantize)
    policy = make_policy(loaded, rank=2, scale=1.0, seed=0, for_cpu=for_cpu, dense=dense)
    final = sum(array.nbytes for array in parameters(policy.model).values())
    assert mx.get_peak_memory() - before < final + 1.25 * LARGEST
    held = mx.get_active_memory() - before
    assert final <= held < final + 0.5 * LARGEST


def test_a_model_in_memory_is_cast_array_by_array(folder):
    model = load_model(folder).model
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    held = sum(array.nbytes for array in parameters(model).values())
    # In NumPy's memory: a lazy copy would hold on to the old arrays.
    expected = {name: as_numbers(array) for name, array in parameters(model).items()}
    mx.reset_peak_memory()
    to_float32(model)
    final = before - held + sum(array.nbytes for array in expected.values())
    assert mx.get_peak_memory() < final + 1.25 * LARGEST
    after = parameters(model)
    assert after.keys() == expected.keys()
    for name, array in after.items():
        assert array.dtype in (mx.float32, mx.uint32)
        np.testing.assert_array_equal(np.array(array), expected[name])


@pytest.mark.parametrize("as_float32", [True, False])
def test_dense_values_are_those_of_the_packed_ones(tmp_path, as_float32):
    folder = tiny.make_folder(tmp_path / "model", model_type="qwen2", attention_bias=True)
    in_16_bits(folder)
    packed, dense = load_model(folder).model, load_model(folder).model
    dequantise(dense, as_float32=as_float32)
    found = {path: module for path, module in dense.named_modules() if "weight" in module}
    kind = mx.float32 if as_float32 else mx.bfloat16
    seen = 0
    for path, module in packed.named_modules():
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            continue
        scales, biases = module.scales.astype(kind), module.biases.astype(kind)
        expected = mx.dequantize(module.weight, scales, biases, group_size=32, bits=4)
        assert found[path].weight.dtype == kind
        assert mx.array_equal(found[path].weight, expected).item()
        if "bias" in module:
            assert mx.array_equal(found[path].bias, module.bias.astype(kind)).item()
            seen += 1
    assert seen == 2 * 3
