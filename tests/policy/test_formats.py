"""Quantised formats that people have, made by mlx-lm's own quantisation: each loads, is planned to
the byte, decodes and forks, has the gradient of its dense values, and comes out fused."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import tiny
from mlx_lm.models.switch_layers import SwitchLinear

from localrl.backend import mx, nn, tree_flatten, tree_unflatten
from localrl.diagnostics.doctor import look_at_model
from localrl.engines.choose import choose_engine
from localrl.engines.mlx.network import Float32Head, in_training
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.export.adapters import adapter_of
from localrl.export.fused import export_fused
from localrl.memory.sizes import read_sizes, weight_bytes
from localrl.policy.folder import check_folder
from localrl.policy.model import load_model

TOKENS = mx.array([[1, 5, 9, 2, 7] * 7, [3, 8, 8, 30, 11] * 7])
WIDE = {"hidden_size": 128, "intermediate_size": 256}
FORMATS = {
    "mixed_2_6": {"recipe": "mixed_2_6", "group": 64, "num_hidden_layers": 4},
    "mixed_4_6": {"recipe": "mixed_4_6", "group": 32},
    "3 bits, groups of 128": {"bits": 3, "group": 128},
    "5 bits": {"bits": 5, "group": 32},
    "6 bits": {"bits": 6, "group": 64},
    "8 bits": {"bits": 8, "group": 64},
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
    "mxfp8": {"mode": "mxfp8"},
    # Its routers have 8 affine bits, as mlx-lm gives them in any mode.
    "mxfp4, experts": {"mode": "mxfp4", **tiny.FAMILIES["qwen3_moe"]},
    "nvfp4, experts": {"mode": "nvfp4", **tiny.FAMILIES["qwen3_moe"]},
    "mixed_4_6, experts": {"recipe": "mixed_4_6", "group": 32, **tiny.FAMILIES["qwen3_moe"]},
}


def pack(folder, *, bits=None, group=None, mode="affine", recipe=None, whole=False, **changes):
    """Make a folder as mlx-lm's conversion does. recipe: one of its mixed ones."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model, save_model

    tiny.make_folder(folder, bits=None, **{**WIDE, **changes})
    model = load_model(folder).model
    choose = mixed_quant_predicate_builder(recipe, model, group) if recipe else None
    config = json.loads((folder / "config.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(
            model, config, group, bits, mode, global_scale=whole, quant_predicate=choose
        )
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def open_policy(folder, **options):
    options = {"rank": 4, "scale": 2.0, "seed": 0, "for_cpu": True, "dense": False, **options}
    policy = make_policy(load_model(folder), **options)
    tiny.stir(policy.model, seed=0)
    return policy


@pytest.fixture(scope="module", params=FORMATS)
def made(request, tmp_path_factory):
    """A folder, and a policy of it that keeps the weights packed."""
    folder = pack(tmp_path_factory.mktemp("formats") / "model", **FORMATS[request.param])
    return folder, open_policy(folder)


def base_bytes(model):
    named = tree_flatten(model.parameters())
    return sum(array.nbytes for name, array in named if "lora_" not in name)


def gradient(model):
    def loss(model):
        return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:]).sum()

    with in_training(model):
        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))


def unpack(model):
    """Put MLX's own dense values in the place of everything that is packed."""
    for path, module in model.named_modules():
        if "scales" in module:
            values = mx.dequantize(
                module.weight, module.scales, module.get("biases"), module.group_size, module.bits,
                module.mode, dtype=mx.float32,
            )  # fmt: skip
            dense = nn.Embedding(1, 1) if hasattr(module, "dims") else nn.Linear(1, 1, bias=False)
            dense = SwitchLinear(1, 1, 1, bias=False) if values.ndim == 3 else dense
            dense.weight = values
            model.update_modules(tree_unflatten([(path, dense)]))
    model.freeze()
    for module in model.modules():
        if "lora_a" in module:
            module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)


def test_planned_bytes_are_those_of_the_file_and_in_memory(made):
    folder, policy = made
    sizes = read_sizes(check_folder(folder))
    stored = mx.load(str(folder / "model.safetensors")).values()
    planned = weight_bytes(sizes, float32=True, dense=False)
    assert planned == sum(array.nbytes for array in stored) == base_bytes(policy.model)
    unpacked = base_bytes(open_policy(folder, dense=True).model)
    assert weight_bytes(sizes, float32=True, dense=True) == unpacked


def test_logits_and_gradients_are_those_of_the_dense_values(made):
    folder, policy = made
    plain = open_policy(folder)
    unpack(plain.model)
    logits = np.array(policy.model(TOKENS))
    np.testing.assert_allclose(logits, np.array(plain.model(TOKENS)), atol=2e-5, rtol=1e-5)
    expected, found = gradient(plain.model), gradient(policy.model)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        largest = mx.abs(array).max().item()
        assert largest > 0
        assert mx.abs(found[name] - array).max().item() < 1e-5 * largest, name


def test_it_decodes_and_forks(made):
    told = []
    checked = choose_engine(made[1], warn=told.append)
    assert told == []
    assert {check.verdict for check in checked.checks} == {"ok"}
    assert {"forked_rows", "shared_prompts", "layers_together"} <= {c.name for c in checked.checks}


def test_it_comes_out_fused(made, tmp_path):
    folder, policy = made
    fused = export_fused(adapter_of(policy.model), folder, tmp_path / "fused", dtype="float32")
    assert min(layer.cosine for layer in fused.layers) > 0.999
    logits = np.array(load_model(fused.folder).model(TOKENS))
    np.testing.assert_allclose(logits, np.array(policy.model(TOKENS)), atol=2e-5, rtol=1e-5)


def test_the_cpu_engine_computes_the_unpacked_values(made):
    folder, policy = made
    unpacked = open_policy(folder, dense=True)
    logits = np.array(policy.model(TOKENS))
    np.testing.assert_allclose(np.array(unpacked.model(TOKENS)), logits, atol=2e-5)
    plain = check_folder(folder)["model_type"] == "qwen3"
    assert choose_engine(unpacked).engine.name == ("cpu" if plain else "mlx")


@pytest.mark.parametrize(("mode", "dtype"), [("mxfp4", "fp16"), ("nvfp4", "bf16")])
def test_bytes_as_scales_do_not_change_the_floats(tmp_path, mode, dtype):
    """MLX's packed embedding would return bfloat16, which beside float16 makes float32."""
    folder = pack(tmp_path / "model", mode=mode)
    policy = open_policy(folder, dtype=dtype)
    kind = {"fp16": mx.float16, "bf16": mx.bfloat16}[dtype]
    body = policy.model.model
    assert body.embed_tokens(TOKENS).dtype == kind
    assert body(TOKENS).dtype == kind
    assert isinstance(policy.engine.network.head, Float32Head)
    assert policy.engine.network.head(body(TOKENS)[0]).dtype == mx.float32


def test_one_scale_for_all_of_an_expert_needs_a_gpu(tmp_path):
    folder = pack(tmp_path / "model", mode="nvfp4", whole=True, **tiny.FAMILIES["qwen3_moe"])
    sizes = read_sizes(check_folder(folder))
    stored = mx.load(str(folder / "model.safetensors"))
    assert any(name.endswith("global_scale") for name in stored)
    assert weight_bytes(sizes, float32=True, dense=False) == sum(a.nbytes for a in stored.values())
    with pytest.raises(ConfigError, match=r"nvfp4 with a global scale.*only on a GPU"):
        open_policy(folder)


def test_doctor_names_the_formats(tmp_path):
    folder = pack(tmp_path / "model", mode="mxfp4", **tiny.FAMILIES["qwen3_moe"])
    rows = {row.id: row for row in look_at_model(str(folder))}
    assert rows["quantisation"].text == "4 (mxfp4) and 8 bits"
    assert rows["adapters"].text.startswith("on layers of")
    assert "MLX computes this model; NumPy computes llama" in rows["engine"].text
    assert "fail" not in {row.status for row in rows.values()}
