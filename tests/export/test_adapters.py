"""Adapter folders: what other programs read from them, and what is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import a_policy, change_config, equal, write, write_foreign

from localrl import backend
from localrl.backend import mx
from localrl.errors import CheckpointError
from localrl.export import peft
from localrl.export.adapters import adapter_of, peft_note, read_adapter, write_adapter
from localrl.policy.model import load_model

FILES = {
    "adapter_config.json",
    "adapters.safetensors",
    "adapter_model.safetensors",
    "localrl.json",
}

HALVES = ("lora_A", "lora_B")

ROUNDING = 0.0 if backend.describe().blas == "numpy-openblas" else 1e-5
"""Difference allowed to mlx-lm's layer, which scales and adds in steps of its own: another BLAS, or
a GPU, may round between them."""


def logits(model):
    return np.array(model(mx.array([[1, 5, 9, 2, 7]])))


def in_mlx_lm(folder, adapter):
    """The model as mlx-lm reads it; float32 stays, as the tiny models are stored in it."""
    from mlx_lm.utils import load

    return load(str(folder), adapter_path=str(adapter))[0]


@pytest.fixture
def written(tmp_path, tiny_folder):
    return write(tiny_folder, tmp_path / "a")


@pytest.fixture
def foreign(tmp_path, tiny_folder):
    return write_foreign(tiny_folder, tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 1}, {"keys": ("self_attn.q_proj", "mlp.down_proj")}],
    ids=["all", "last block", "two keys"],
)
def test_mlx_lm_computes_exactly_the_same(tmp_path, tiny_folder, options):
    policy = a_policy(tiny_folder, **options)
    bare = logits(load_model(tiny_folder).model)
    write_adapter(adapter_of(policy.model), tmp_path / "a")
    loaded = in_mlx_lm(tiny_folder, tmp_path / "a")
    assert np.abs(logits(policy.model) - bare).max() > 0.005
    assert np.abs(logits(loaded) - logits(policy.model)).max() <= ROUNDING


def test_the_embedded_model_in_mlx_lm(tmp_path):
    from localrl.embedded import embedded_model_path

    policy = a_policy(embedded_model_path(), rank=16)
    write_adapter(adapter_of(policy.model), tmp_path / "a")
    loaded = in_mlx_lm(embedded_model_path(), tmp_path / "a")
    assert np.abs(logits(loaded) - logits(policy.model)).max() <= ROUNDING


def test_a_quantised_base_in_float32_is_what_mlx_lm_has(tiny_folder):
    """The equality above is about adapters: it needs the same base on both sides."""
    from mlx_lm.utils import load

    bare = load(str(tiny_folder))[0]
    assert np.abs(logits(bare) - logits(load_model(tiny_folder).model)).max() == 0


@pytest.mark.parametrize(
    "options", [{}, {"layers": 1}, {"layers": 2, "keys": ("self_attn.q_proj", "mlp.down_proj")}]
)
def test_what_is_written_comes_back(tmp_path, tiny_folder, options):
    adapter = adapter_of(a_policy(tiny_folder, **options).model, base_id="Some/Model")
    write_adapter(adapter, tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    equal(back.weights, adapter.weights)
    assert (back.rank, back.scale, back.base_id) == (4, 2.0, "Some/Model")
    assert back.layers == options.get("layers", 2)
    assert set(back.keys) == set(adapter.keys)
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES


def test_peft_gets_transposes_under_hugging_face_names(written):
    """PEFT adds lora_alpha / r * lora_B @ lora_A @ x to the layer of that name."""
    theirs = mx.load(str(written / "adapter_model.safetensors"))
    ours = mx.load(str(written / "adapters.safetensors"))
    assert len(theirs) == len(ours) == 2 * 2 * 7
    name = "model.layers.1.mlp.down_proj"
    a, b = ours[f"{name}.lora_a"], ours[f"{name}.lora_b"]
    assert (a.shape, b.shape) == ((128, 4), (4, 64))
    lora_a = theirs[f"base_model.model.{name}.lora_A.weight"]
    lora_b = theirs[f"base_model.model.{name}.lora_B.weight"]
    np.testing.assert_array_equal(np.array(lora_a), np.array(a).T)
    np.testing.assert_array_equal(np.array(lora_b), np.array(b).T)
    x = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    config = json.loads((written / "adapter_config.json").read_text())
    peft_adds = config["lora_alpha"] / config["r"] * (x @ np.array(lora_a).T @ np.array(lora_b).T)
    np.testing.assert_allclose(peft_adds, 2.0 * x @ np.array(a) @ np.array(b), rtol=1e-5)


def test_the_file_of_peft_is_sound_for_the_safetensors_library(written):
    from safetensors.numpy import load_file

    theirs = load_file(written / "adapter_model.safetensors")
    ours = mx.load(str(written / "adapters.safetensors"))
    for name, array in ours.items():
        other = f"base_model.model.{name[:-1]}{name[-1].upper()}.weight"
        np.testing.assert_array_equal(theirs[other], np.array(array).T)


def test_one_configuration_with_both_sets_of_keys(written):
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"] | {"keys": 0} == {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.0,
        "keys": 0,
    }
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert type(config["lora_alpha"]) is int
    assert config["lora_alpha"] == 8
    assert "q_proj" in config["target_modules"]
    assert config["base_model_name_or_path"] == "Some/Model"
    assert "layers_to_transform" not in config


def test_some_blocks_in_both_sets_of_keys(tmp_path, tiny_folder):
    write_adapter(adapter_of(a_policy(tiny_folder, layers=1).model), tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["num_layers"] == 1
    assert config["layers_to_transform"] == [1]
    assert "base_model_name_or_path" not in config


@pytest.mark.parametrize(("scale", "alpha"), [(0.1, 1), (2.0, 20), (0.33, 3.3000000000000003)])
def test_alpha_is_whole_where_it_can_be(scale, alpha):
    weights = {"model.layers.0.mlp.up_proj.lora_a": mx.zeros((2, 10))}
    found = peft.config("qwen3", weights, 10, scale, None)["lora_alpha"]
    assert found == alpha
    assert type(found) is type(alpha)


def test_a_peft_folder_alone_is_read(written):
    before = read_adapter(written)
    (written / "localrl.json").unlink()
    (written / "adapters.safetensors").unlink()
    change_config(written, lora_parameters=None, base_model_name_or_path="/home/someone/model")
    config = json.loads((written / "adapter_config.json").read_text())
    del config["lora_parameters"], config["num_layers"]
    (written / "adapter_config.json").write_text(json.dumps(config))
    back = read_adapter(written)
    equal(back.weights, before.weights)
    assert (back.rank, back.scale, back.layers) == (4, 2.0, 0)
    assert back.base_id is None  # a path of another machine is no name
    change_config(written, use_rslora=True)
    assert read_adapter(written).scale == 4.0  # 8 / sqrt(4)


def test_an_mlx_lm_folder_is_read(tiny_folder, foreign):
    change_config(foreign, num_layers=16)  # more than there are means all, in mlx-lm
    adapter = read_adapter(foreign)
    assert adapter.layers_of(2) == 0
    assert len(adapter.weights) == 28
    change_config(foreign, num_layers=-1)
    assert read_adapter(foreign).layers_of(2) == 0


def test_a_family_that_was_not_checked_gets_no_peft_half(tmp_path, tiny_folder):
    adapter = replace(adapter_of(a_policy(tiny_folder).model), model_type="mamba")
    reason = write_adapter(adapter, tmp_path / "a")
    assert reason is not None
    assert "mamba" in reason
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES - {
        "adapter_model.safetensors"
    }
    assert "peft_type" not in json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert peft_note(tmp_path / "a") == reason
    assert read_adapter(tmp_path / "a").model_type == "mamba"


def random_adapter(path, inputs, outputs, rank=3):
    draws = np.random.default_rng(len(path))
    a, b = draws.normal(size=(inputs, rank)), draws.normal(size=(rank, outputs))
    return {f"{path}.lora_a": mx.array(a), f"{path}.lora_b": mx.array(b)}


def test_layers_that_transformers_joins_have_one_adapter_with_both_updates():
    """Its update is that of the gate above that of the other half, at twice the rank."""
    block = "model.layers.1.mlp"
    weights = random_adapter(f"{block}.gate_proj", 5, 4) | random_adapter(f"{block}.up_proj", 5, 4)
    tensors = peft.to_peft("granitemoehybrid", weights)
    name = "model.layers.1.shared_mlp.input_linear"
    a, b = (np.array(tensors[f"base_model.model.{name}.{half}.weight"]) for half in HALVES)
    updates = [
        np.array(weights[f"{block}.{part}.lora_b"].T @ weights[f"{block}.{part}.lora_a"].T)
        for part in ("gate_proj", "up_proj")
    ]
    assert len(tensors) == 2
    np.testing.assert_allclose(b @ a, np.concatenate(updates), atol=1e-5)
    config = peft.config("granitemoehybrid", weights, 3, 2.0, None)
    assert config["target_modules"] == [name]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({name: 6}, {name: 12})


def test_half_of_a_joined_layer_leaves_the_other_half_as_it_is():
    weights = random_adapter("model.layers.0.mlp.up_proj", 5, 4)
    tensors = peft.to_peft("granitemoehybrid", weights)
    name = "base_model.model.model.layers.0.shared_mlp.input_linear"
    b = np.array(tensors[f"{name}.lora_B.weight"])
    assert b.shape == (8, 3)
    assert not b[:4].any()
    assert b[4:].all()
    assert "rank_pattern" not in peft.config("granitemoehybrid", weights, 3, 2.0, None)


def test_a_layer_that_peft_would_skip_is_named_with_the_setting_that_leaves_it_out():
    weights = random_adapter("backbone.layers.0.mixer.in_proj", 5, 4)
    assert peft.why_not("nemotron_h", weights) is None
    weights |= random_adapter("backbone.layers.0.mixer.out_proj", 4, 5)
    reason = peft.why_not("nemotron_h", weights)
    assert reason is not None
    assert "mixer.out_proj" in reason
    assert 'lora.keys = ["mixer.in_proj"]' in reason


def linear_names(module: str) -> set[str]:
    """Attributes that a module's source gives linear layers to."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called == "nn.Linear":
                found |= {t.attr for t in node.targets if isinstance(t, ast.Attribute)}
    return found - {"lm_head"}


@pytest.mark.parametrize("family", sorted(peft.SAME))
def test_the_checked_families_name_their_layers_as_transformers_does(family):
    pytest.importorskip("transformers")
    theirs = "gemma3" if family == "gemma3_text" else family
    ours = "llama" if family in ("mistral", "smollm3") else family
    names = linear_names(f"mlx_lm.models.{ours}")
    assert names
    assert names == linear_names(f"transformers.models.{theirs}.modeling_{theirs}")


def test_writing_again_replaces_ours_and_nothing_else(tmp_path, tiny_folder, written):
    adapter = adapter_of(a_policy(tiny_folder, stirred=False).model)
    write_adapter(replace(adapter, model_type="mamba"), written)
    equal(read_adapter(written).weights, adapter.weights)
    assert not (written / "adapter_model.safetensors").exists()  # it would be the old one
    others = tmp_path / "others"
    others.mkdir()
    (others / "adapters.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="Nothing was written there"):
        write_adapter(adapter, others)
    assert (others / "adapters.safetensors").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "others"}


def test_nothing_of_this_machine_is_in_the_folder(written):
    here = str(written).encode()
    assert all(here not in path.read_bytes() for path in written.iterdir())
    assert set(json.loads((written / "localrl.json").read_text())) == {
        "format",
        "sha256",
        "rank",
        "scale",
        "model_type",
        "base_model",
        "peft_left_out",
        "versions",
    }
