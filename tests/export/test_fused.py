"""Fused models: how much of the update is in them, what they say, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny

from localrl.backend import mx
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.export.adapters import Adapter, adapter_of
from localrl.export.compare import greedy_pairs
from localrl.export.fused import export_fused, median
from localrl.policy.model import load_model

PROMPTS = [(1, 5 + n, 9, 2 + n, 7) for n in range(20)]


def an_adapter(folder, *, size=0.05, **options):
    policy = make_policy(
        load_model(folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=False, **options
    )
    tiny.stir(policy.model, seed=1, size=size)
    return adapter_of(policy.model, base_id="Some/Model")


def logits(model):
    return np.array(model(mx.array([[1, 5, 9, 2, 7]])).astype(mx.float32))


def test_what_is_measured_is_what_it_says(tmp_path):
    """A layer by hand: W is one in float16's grid, the update is half kept, or lost."""
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.1.self_attn.q_proj"
    weights[f"{name}.weight"] = mx.ones((64, 64))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    step = 2.0**-10  # of float16 at 1
    a = mx.zeros((64, 1)) + mx.array([[1.0]] + [[0.0]] * 63)  # only the first input counts
    b = mx.array([[3 * step, 0.25 * step] + [0.0] * 62])  # kept as it is, and lost
    adapter = Adapter({f"{name}.lora_a": a, f"{name}.lora_b": b}, 1, 1.0, 1, ("self_attn.q_proj",))
    (layer,) = export_fused(adapter, folder, tmp_path / "out", dtype="float16").layers
    length = step * np.sqrt(3**2 + 0.25**2)
    assert layer.name == name
    assert layer.size == pytest.approx(length / 64, rel=1e-4)
    assert layer.error == pytest.approx(0.25 * step / length, rel=1e-4)
    assert layer.cosine == pytest.approx(3 * step / length, rel=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_fused_model_answers_as_the_base_with_its_adapter(tmp_path, bits):
    folder = tiny.make_folder(tmp_path / "model", bits=bits)
    adapter = an_adapter(folder)
    made = export_fused(adapter, folder, tmp_path / "out")
    assert (made.dtype, len(made.layers)) == ("float16", 14)
    assert min(layer.cosine for layer in made.layers) > 0.98
    pairs = list(
        greedy_pairs(adapter, folder, made.folder, PROMPTS, most=8, base_bits=0, on_cpu=True)
    )
    assert len({one for one, _ in pairs}) > 5
    # Random weights come near to ties, which float16 may break the other way.
    assert sum(one == other for one, other in pairs) >= 18


def test_the_comparison_can_tell_them_apart(tmp_path, tiny_folder):
    adapter = an_adapter(tiny_folder, size=0.3)
    none = replace(adapter, weights={n: mx.zeros(w.shape) for n, w in adapter.weights.items()})
    made = export_fused(none, tiny_folder, tmp_path / "out")
    assert made.layers == ()
    pairs = greedy_pairs(
        adapter, tiny_folder, made.folder, PROMPTS[:5], most=8, base_bits=0, on_cpu=True
    )
    assert any(one != other for one, other in pairs)


def test_mlx_lm_loads_it(tmp_path, tiny_folder):
    from mlx_lm.utils import load

    adapter = an_adapter(tiny_folder)
    export_fused(adapter, tiny_folder, tmp_path / "out", dtype="float32")
    fused = load(str(tmp_path / "out"))[0]
    ours = make_policy(
        load_model(tiny_folder),
        rank=4,
        scale=2.0,
        seed=0,
        for_cpu=True,
        dense=False,
        weights=adapter.weights,
    )
    np.testing.assert_allclose(logits(fused), logits(ours.model), atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config
    assert config["torch_dtype"] == "float32"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'library_name: "mlx"' in card
    assert 'base_model: "Some/Model"' in card
    assert "finetune" in card
    here = str(tmp_path).encode()
    assert all(here not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_packing_again_loses_a_small_update_and_says_so(tmp_path, tiny_folder):
    adapter = an_adapter(tiny_folder, size=0.002)
    dense = export_fused(adapter, tiny_folder, tmp_path / "dense")
    packed = export_fused(adapter, tiny_folder, tmp_path / "packed", bits=4)
    assert median([layer.cosine for layer in dense.layers]) > 0.98
    assert median([layer.cosine for layer in packed.layers]) < 0.5
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["group_size"] == 32  # the base's
    assert load_model(tmp_path / "packed").model.layers[0].mlp.up_proj.bits == 4


def test_an_update_too_small_for_float16_makes_a_float32_model(tmp_path, tiny_folder):
    adapter = an_adapter(tiny_folder, size=1e-5)
    made = export_fused(adapter, tiny_folder, tmp_path / "small")
    assert made.dtype == "float32"
    assert "too small for float16" in made.reason
    assert min(layer.cosine for layer in made.layers) > 0.98
    asked = export_fused(adapter, tiny_folder, tmp_path / "asked", dtype="float16")
    assert (asked.dtype, asked.reason) == ("float16", "as requested")
    assert min(layer.cosine for layer in asked.layers) < 0.98


def test_values_beyond_float16_make_a_float32_model(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = mx.full((64,), 1e5)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    adapter = an_adapter(folder)
    made = export_fused(adapter, folder, tmp_path / "out")
    assert made.dtype == "float32"
    assert "model.norm.weight has numbers beyond 65504" in made.reason
    with pytest.raises(ConfigError, match=r"not finite as float16\. Use --dtype float32"):
        export_fused(adapter, folder, tmp_path / "asked", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_model_quantised_when_it_was_read_is_fused_as_it_was(tmp_path):
    """The adapter corrects the packed weights, so that these are what it is added to."""
    folder = tiny.make_folder(tmp_path / "model", bits=None, hidden_size=64)
    loaded = load_model(folder, quantize=4)
    policy = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=True, dense=False)
    tiny.stir(policy.model, seed=1)
    adapter = adapter_of(policy.model)
    export_fused(adapter, folder, tmp_path / "out", base_bits=4, dtype="float32")
    fused = load_model(tmp_path / "out").model
    np.testing.assert_allclose(logits(fused), logits(policy.model), atol=1e-5)
    export_fused(adapter, folder, tmp_path / "other", dtype="float32")
    other = load_model(tmp_path / "other").model
    assert np.abs(logits(other) - logits(policy.model)).max() > 1e-3


def test_an_existing_folder_is_left_alone(tmp_path, tiny_folder):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_fused(an_adapter(tiny_folder), tiny_folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("values", "middle"), [([3, 1, 2], 2), ([4, 1, 2, 3], 2.5)])
def test_the_median(values, middle):
    assert median(values) == middle
