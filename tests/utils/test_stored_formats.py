"""Number formats named in a config.json: what is read, and what is refused before loading."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from localrl.backend import mx, tree_flatten
from localrl.cli.plan import plan
from localrl.diagnostics.doctor import look_at_model
from localrl.errors import ConfigError
from localrl.memory.sizes import read_sizes, weight_bytes
from localrl.policy.folder import check_folder
from localrl.policy.model import load_model
from localrl.utils.stored_formats import StoredFormat, check_stored, stored_format

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
IN_QWEN3 = "which this version of mlx-lm does not read for the family qwen3"
UNREAD = {
    "'bitsandbytes', which mlx-lm": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "'bitsandbytes', which mlx-lm does not read": {"load_in_4bit": True},
    "'gptq' (bits 4), which mlx-lm": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "'bitnet', which mlx-lm": {"quant_method": "bitnet"},
    "'awq' (bits 8), which mlx-lm": {"quant_method": "awq", "bits": 8},
    "'awq' (version 'gemv'), which mlx-lm": {"quant_method": "awq", "version": "gemv"},
    f"'fp8', {IN_QWEN3}": FP8,
    f"'compressed-tensors', {IN_QWEN3}": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
    },
    "'FP8', which mlx-lm": {"quant_method": "FP8"},
    "['fp8'], which mlx-lm": {"quant_method": ["fp8"]},
    "None (bits 4), which mlx-lm": {"bits": 4, "group_size": 64},
}
"""Settings by what is said about them."""
READ = [
    ({}, StoredFormat()),
    ({"quantization_config": {}}, StoredFormat()),
    ({"quantization": {"bits": 3, "group_size": 128}}, StoredFormat(3, 128)),
    ({"quantization": {"mode": "nvfp4"}}, StoredFormat(4, 16, "nvfp4")),
    ({"quantization": {"bits": 4}, "quantization_config": FP8}, StoredFormat(4, 64)),
    ({"model_type": "ministral3", "quantization_config": FP8}, StoredFormat()),
    # A name that mlx-lm has no file for is left to mlx-lm.
    ({"model_type": "kimi_k2", "quantization_config": FP8}, StoredFormat()),
    # A model that sees as well: its language model's code handles the tensors.
    (
        {
            "model_type": "mistral3",
            "text_config": {"model_type": "ministral3", "quantization_config": FP8},
        },
        StoredFormat(),
    ),
    (
        {
            "model_type": "ministral3",
            "quantization_config": {
                **FP8,
                "scale_fmt": "ue8m0",
                "weight_block_size": [32, 32],
            },
        },
        StoredFormat(8, 32, "mxfp8", within_blocks=True),
    ),
    (
        {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
        StoredFormat(4, 32, "mxfp4", within_blocks=True),
    ),
    (
        {
            "model_type": "deepseek_v3",
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
            },
        },
        StoredFormat(4, 16, "nvfp4", within_blocks=True),
    ),
]


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(("config", "expected"), READ)
def test_what_is_read(config, expected):
    assert stored_format(config) == expected


@pytest.mark.parametrize("message", UNREAD)
def test_a_method_that_is_not_read_is_named_by_every_way_in(tmp_path, message):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    rewrite(folder, quantization_config=UNREAD[message])
    found = re.escape(f"The weights are stored with quant_method {message}")
    with pytest.raises(ConfigError, match=found):
        load_model(folder)
    with pytest.raises(ConfigError, match=found):
        read_sizes(json.loads((folder / "config.json").read_text()))
    (row,) = look_at_model(str(folder))
    assert row.status == "fail"
    assert re.match(found, row.text)
    assert "--quantize 4 quantises when it is loaded" in row.text


@pytest.mark.parametrize("inner", [False, True])
def test_settings_that_are_no_table_are_refused(inner):
    for settings in ([1], "awq", 4):
        config = {"quantization_config": settings}
        with pytest.raises(ConfigError, match="has an impossible quantization_config: "):
            stored_format({"text_config": config} if inner else config)


def test_the_plan_says_so_too(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    rewrite(folder, quantization_config={"quant_method": "bitsandbytes"})
    run = CliRunner().invoke(plan, ["--model", str(folder)])
    assert isinstance(run.exception, ConfigError)
    assert "quant_method 'bitsandbytes', which mlx-lm does not read" in str(run.exception)


def test_modelopt_may_have_a_file_of_its_own(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    settings = {"quantization": {"quant_algo": "FP8"}, "quant_method": "modelopt"}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="quant_method 'modelopt'"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"mode": "mxfp5", "bits": 5}}, "mode 'mxfp5'; MLX has affine, mxfp4"),
        ({"quantization": {"bits": 4, "a.b": {"mode": "other"}}}, "mode 'other'"),
        ({"quantization": {"bits": -4}}, r"impossible quantization\.bits: -4"),
        ({"quantization": "4"}, "impossible quantization: '4'"),
        ({"quantize_activations": True}, "such layers have no gradient"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        stored_format(changes)


Q, DOWN, NORM, EMBED = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.norm",
    "model.embed_tokens",
)


def retype(folder, names, kind):
    """Write the tensors of these names as numbers of another format, a byte or four each."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, place, body = json.loads(data[8 : 8 + size]), 0, b""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        piece = data[8 + size + begin : 8 + size + end]
        if name in names:
            width = {"U8": 1, "I8": 1, "I32": 4, "U32": 4, "F64": 8}.get(kind, 1)
            piece = bytes(int(np.prod(entry["shape"])) * width)
            entry["dtype"] = kind
        entry["data_offsets"] = [place, place + len(piece)]
        place, body = place + len(piece), body + piece
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ([Q], "F8_E4M3", f"matrix {Q}.weight is stored as F8_E4M3, which is neither floats"),
        ([Q, DOWN], "F8_E4M3", r"F8_E4M3 \(and 1 more\), which is neither"),
        ([EMBED], "U8", f"matrix {EMBED}.weight is stored as U8, which is neither"),
        ([DOWN], "I8", f"matrix {DOWN}.weight is stored as I8, which is neither"),
        ([DOWN], "I32", f"matrix {DOWN}.weight is stored as I32, which is neither"),
        ([NORM], "F8_E4M3", f"matrix {NORM}.weight is stored as F8_E4M3"),
        ([Q], "F8_E5M2", f"tensor {Q}.weight is stored as F8_E5M2, which MLX cannot load"),
        ([Q], "F64", f"tensor {Q}.weight is stored as F64, which MLX cannot load"),
    ],
)
def test_what_is_neither_floats_nor_named_is_refused(tmp_path, layers, kind, message):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    retype(folder, [f"{layer}.weight" for layer in layers], kind)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)
    (row,) = look_at_model(str(folder))
    assert (row.status, bool(re.search(message, row.text))) == ("fail", True)
    run = CliRunner().invoke(plan, ["--model", str(folder)])
    assert isinstance(run.exception, ConfigError)
    assert "--quantize 4 quantises when it is loaded" in str(run.exception)


def test_packed_matrices_need_settings_and_scales(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=4)
    config = json.loads((folder / "config.json").read_text())
    rewrite(folder, quantization=None)
    with pytest.raises(ConfigError, match=r"stored quantised \(and 14 more\), but config.json has"):
        check_folder(folder)
    rewrite(folder, **config)
    weights = mx.load(str(folder / "model.safetensors"))
    del weights[f"{DOWN}.scales"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ConfigError, match=f"{DOWN}.weight is stored as U32, which is neither"):
        check_folder(folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.rotary.inv_freq": "F32", "h.0.attn.bias": "BOOL", "position_ids": "I64"},
        {"a.weight": "U32", "a.scales": "U8"},  # mxfp4
        {"a.weight": "U32", "a.scales": "BF16", "a.biases": "BF16", "b.weight": "F16"},
        {"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"},
        {"a.gate_up_proj_blocks": "U8", "a.gate_up_proj_scales": "U8"},
    ],
)
def test_what_is_explained_is_read(tensors):
    named: dict = {"quantization": {"bits": 4}} if "a.scales" in tensors else {}
    if not named and "position_ids" not in tensors:
        named = {"quantization_config": FP8}
    check_stored(named, tensors)


@pytest.mark.parametrize(
    "name",
    ["a.qweight", "a.weight_packed", "e.gate_up_proj", "e.gate_up_proj_blocks", "x.bias_f8"],
)
def test_no_name_hides_a_matrix(name):
    with pytest.raises(ConfigError, match=f"matrix {name} is stored as F8_E4M3"):
        check_stored({}, {"a.weight_scale": "F8_E8M0", name: "F8_E4M3"})


@pytest.mark.parametrize("kind", ["I8", "U8", "F8_E4M3", "I32"])
def test_scales_alone_do_not_explain_a_matrix(kind):
    """MLX packs into unsigned integers of 32 bits."""
    with pytest.raises(ConfigError, match=f"matrix a.weight is stored as {kind}, which is neither"):
        check_stored({"quantization": {"bits": 8}}, {"a.weight": kind, "a.scales": "F16"})


def test_a_layer_that_a_family_left_as_bytes_is_refused(tmp_path):
    """The family reads fp8, but this layer has no scales to read it with."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    rope["original_max_position_embeddings"] = 4096
    folder = tiny.make_folder(
        tmp_path / "model", bits=None, model_type="ministral3", rope_parameters=rope
    )
    rewrite(folder, quantization_config=FP8)
    check_folder(retype(folder, [f"{Q}.weight"], "F8_E4M3"))
    with pytest.raises(ConfigError, match=r"q_proj was loaded as uint8, which is neither floats"):
        load_model(folder)


def test_tensors_that_do_not_fit_are_told_in_few_words(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=None)
    weights = mx.load(str(folder / "model.safetensors"))
    named = {f"other.{name}": array for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), named)
    with pytest.raises(ConfigError, match=r"and \d+ more\.$") as told:
        load_model(folder)
    assert len(str(told.value)) < 600


def pack_awq(weight, group):
    """One matrix as AutoAWQ stores it; its values are then (q - zero) * scale."""
    draws = np.random.default_rng(0)
    outputs, inputs = weight.shape
    q = draws.integers(0, 16, (outputs, inputs))
    zeros = draws.integers(5, 11, (outputs, inputs // group))
    # So few bits of mantissa that float16 holds zero * scale as it is.
    scales = draws.choice([1, 1.25, 1.5, 1.75], zeros.shape).astype(np.float16) / 128
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of 8 outputs within 32 bits, the lowest first

    def pack(values):
        parts = values.T.reshape(values.shape[1], outputs // 8, 8)[..., order]
        return (parts.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(-1)

    wide = [np.repeat(part, group, axis=1) for part in (zeros, scales.astype(np.float32))]
    packed = {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales.T}
    return packed, (q - wide[0]) * wide[1]


def test_awq_is_read_as_it_was_meant(tmp_path):
    dense, folder = (tiny.make_folder(tmp_path / name, bits=None) for name in ("dense", "packed"))
    weights = mx.load(str(dense / "model.safetensors"))
    packed = {}
    for name, array in weights.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            packed[name] = weights[name] = array.astype(mx.float16)
            continue
        parts, values = pack_awq(array, 32)
        weights[name] = mx.array(values.astype(np.float32))
        for part, value in parts.items():
            kind = mx.float16 if part == "scales" else mx.uint32
            packed[f"{layer}.{part}"] = mx.array(np.ascontiguousarray(value)).astype(kind)
    mx.save_safetensors(str(dense / "model.safetensors"), weights)
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    rewrite(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    model = load_model(folder).model
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(read_sizes(check_folder(folder)), float32=False, dense=False) == held
    plain, tokens = load_model(dense).model, mx.array([[1, 5, 9, 2, 7]])
    for made in (model, plain):
        made.set_dtype(mx.float32)
    expected = np.array(plain(tokens))
    np.testing.assert_allclose(np.array(model(tokens)), expected, atol=1e-4)
    assert np.abs(expected).max() > 0.5
