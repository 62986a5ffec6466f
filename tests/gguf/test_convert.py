"""A GGUF file becomes a folder that computes what the file says."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from written import CONFIG, CONFIGS, TOKENS, write_model

from localrl.backend import mx, tree_flatten
from localrl.errors import ConfigError, LocalRLError
from localrl.gguf.convert import as_folder
from localrl.gguf.families import FAMILIES, family_of, tensor_names, to_halves, to_pairs
from localrl.gguf.reader import read_gguf
from localrl.gguf.settings import config_of, metadata_of, rope_factors
from localrl.memory.sizes import read_sizes, weight_bytes
from localrl.policy.loading import find_model
from localrl.policy.model import load_model
from localrl.policy.precision import dequantise, to_float32
from localrl.training.memory_plan import sizes_of

IDS = mx.array([[7, 30, 2, 301, 99, 5, 5, 260, 17, 44, 3, 90, 12, 13, 14, 200, 201, 8, 77, 150]])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "localrl" / "gguf"


def logits_of(folder):
    model = load_model(folder).model
    dequantise(model, as_float32=True)
    to_float32(model)
    return np.array(model(IDS))


def difference(written, lines):
    folder = as_folder(written.path, lines.append)
    return float(np.abs(logits_of(folder) - np.array(written.model(IDS))).max()), folder


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
EXACT = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_file(cache, tmp_path, architecture, kind):
    lines = []
    found, _ = difference(write_model(tmp_path / "m.gguf", architecture, kind), lines)
    assert found < 1e-3
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("kind", "bits", "most"), [("Q4_K", 4, 0.0005), ("Q5_K", 5, 0.0005), ("Q6_K", 8, 0.005)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_rounded_is_said(cache, tmp_path, architecture, kind, bits, most):
    lines, written = [], write_model(tmp_path / "m.gguf", architecture, kind)
    folder = as_folder(written.path, lines.append)
    assert read(folder, "config.json")["quantization"]["bits"] == bits
    model = load_model(folder).model
    dequantise(model, as_float32=True)
    error, norm = 0.0, 0.0
    found = dict(tree_flatten(model.parameters()))
    for name, wanted in tree_flatten(written.model.parameters()):
        if wanted.ndim == 2:
            error += mx.square(found[name] - wanted).sum().item()
            norm += mx.square(wanted).sum().item()
    relative = (error / norm) ** 0.5
    assert 0 < relative < most
    assert f"from {kind} to {bits} bits; their values changed by {relative:.2%}" in lines[1]


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("gemma3", {"num_key_value_heads": 1}),
    ],
)
def test_heads_and_biases(cache, tmp_path, architecture, config):
    written = write_model(tmp_path / "m.gguf", architecture, "Q8_0", config=config)
    assert difference(written, [])[0] < 1e-3


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def test_scaled_rotary_positions(cache, tmp_path):
    linear = {"rope_type": "linear", "factor": 8.0}
    for name, architecture, scaling, extra in (
        ("linear", "gemma3", linear, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
        (
            "yarn",
            "qwen3",
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 1024,
            },
        ),
    ):
        extra = {f"{architecture}.{key}": value for key, value in extra.items()}
        config = {"rope_scaling": scaling}
        path = tmp_path / f"{name}.gguf"
        found, folder = difference(write_model(path, architecture, config=config, extra=extra), [])
        assert found < 1e-3
        assert read(folder, "config.json")["rope_scaling"] == scaling


def test_the_factors_of_llama_3_become_its_settings(cache, tmp_path):
    config = {"rope_scaling": LLAMA3, "rope_theta": 500000.0}
    lengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    factors = []  # as llama.cpp's conversion computes them
    for length in lengths:
        if length < 8192 / 4:
            factors.append(1.0)
        elif length > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    written = write_model(tmp_path / "m.gguf", config=config, tensors=tensors)
    found, folder = difference(written, [])
    assert found < 1e-3
    assert read(folder, "config.json")["rope_scaling"] == LLAMA3
    again = rope_factors({**CONFIG, **config})
    assert np.allclose(again, factors, rtol=1e-5)
    tensors["rope_freqs.weight"][3] = 1.5
    with pytest.raises(ConfigError, match="not those of Llama 3"):
        as_folder(write_model(tmp_path / "x.gguf", config=config, tensors=tensors).path, print)


def test_what_differs_from_most_matrices_stands_in_the_config(cache, tmp_path):
    written = write_model(tmp_path / "m.gguf", kind={"token_embd": "Q8_0", "ffn_down": "F16"})
    found, folder = difference(written, [])
    settings = read(folder, "config.json")["quantization"]
    assert found < 1e-3
    assert settings == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.0.mlp.down_proj": False,
        "model.layers.1.mlp.down_proj": False,
    }
    sizes = sizes_of(folder, 0)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    counted = weight_bytes(replace(sizes, stored_bytes=None), float32=False, dense=False)
    assert abs(counted - stored) < 10_000  # the header of the file


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_memory_of_every_family_is_counted_right(cache, tmp_path, architecture):
    path = write_model(tmp_path / "m.gguf", architecture, "F16").path
    folder = as_folder(path, print)
    config = {**read(folder, "config.json"), "torch_dtype": "float16"}
    counted = weight_bytes(read_sizes(config), float32=False, dense=False)
    arrays = mx.load(str(folder / "model.safetensors"))
    assert counted == sum(2 * array.size for array in arrays.values())


def test_norms_take_16_bits_only_where_that_changes_none(cache, tmp_path):
    exact = as_folder(write_model(tmp_path / "a.gguf", kind="Q4_0").path, print)
    assert read(exact, "config.json")["torch_dtype"] == "float16"
    path = write_model(tmp_path / "b.gguf", "gemma3", "Q4_0").path  # which overflows in float16
    assert read(as_folder(path, print), "config.json")["torch_dtype"] == "float32"
    path = write_model(tmp_path / "c.gguf", "llama", "Q4_0").path
    data = bytearray(path.read_bytes())
    place = read_gguf(path).tensors["output_norm.weight"].offset
    data[place : place + 4] = np.float32(1.0001).tobytes()
    path.write_bytes(data)
    assert read(as_folder(path, print), "config.json")["torch_dtype"] == "float32"


def test_norms_less_one_take_16_bits_where_the_file_follows_from_them(cache, tmp_path):
    path = write_model(tmp_path / "a.gguf", "gemma3", "BF16").path
    data, file = bytearray(path.read_bytes()), read_gguf(path)
    for tensor in file.tensors.values():
        if len(tensor.shape) == 1:  # 1 + w of a bfloat16 w, rounded to float32
            small = (file.raw(tensor).view(np.uint32) - np.uint32(1 << 23)) & np.uint32(0xFFFF0000)
            stored = np.float32(1) + small.view(np.float32) * np.float32(0.001)
            small = (stored - 1).view(np.uint32) & np.uint32(0xFFFF0000)
            stored = np.float32(1) + small.view(np.float32)
            data[tensor.offset : tensor.offset + tensor.nbytes] = stored.tobytes()
    path.write_bytes(data)
    assert read(as_folder(path, print), "config.json")["torch_dtype"] == "bfloat16"


def test_a_cache_that_was_cleaned_up_in_part_is_told(cache, tmp_path):
    path = write_model(tmp_path / "m.gguf").path
    folder = as_folder(path, print)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json is missing or has changed\. Delete the"
    ):
        as_folder(path, print)
    shutil.rmtree(folder)
    assert as_folder(path, print) == folder


def test_what_a_killed_conversion_left_is_swept_up_after_a_day(cache, tmp_path):
    path = write_model(tmp_path / "m.gguf").path
    folder = as_folder(path, print)
    shutil.rmtree(folder)
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        beside = cache / f".{folder.name}.{name}"
        beside.mkdir()
        os.utime(beside, (time.time() - age,) * 2)
    as_folder(path, print)
    assert sorted(os.listdir(cache)) == [f".{folder.name}.new", folder.name]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        as_folder(write_model(tmp_path / "m.gguf").path, print)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"The file .*absent\.gguf does not exist"):
        find_model(str(tmp_path / "absent.gguf"))


def test_a_file_is_converted_once(cache, tmp_path):
    path, lines = write_model(tmp_path / "m.gguf").path, []
    first = as_folder(path, lines.append)
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert as_folder(path, lines.append) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    assert len(lines) == 1
    touched = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(touched, touched))
    assert as_folder(path, lines.append) == first  # by its hash, which is written down anew
    assert read(first, "gguf.json")["stamp"][1] == touched
    assert len(lines) == 1
    assert os.listdir(cache) == [first.name]


def test_a_changed_file_becomes_another_folder(cache, tmp_path):
    path = write_model(tmp_path / "m.gguf").path
    first = as_folder(path, print)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    second = as_folder(path, print)
    assert first != second
    assert first.is_dir()
    assert second.is_dir()


def test_large_models_become_several_files(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("localrl.gguf.layout.SHARD", 1_000_000)
    found, folder = difference(write_model(tmp_path / "m.gguf"), [])
    assert found < 1e-3
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


def test_any_name_of_a_file_will_do_and_ollamas_have_no_ending(cache, tmp_path, capsys):
    path = write_model(tmp_path / "m.gguf").path
    for name in ("sha256-0a1b", "Ünï côde (1).GGUF", "x" * 200 + ".gguf"):
        shutil.copy(path, tmp_path / name)
        folder = find_model(str(tmp_path / name))
        assert (folder / "config.json").is_file()
    assert capsys.readouterr().err.count("converting it once") == 3


def test_tokens_and_template_arrive(cache, tmp_path):
    tokenizer = load_model(as_folder(write_model(tmp_path / "m.gguf").path, print)).tokenizer
    assert tokenizer.end_ids == {2}
    text = tokenizer.render([{"role": "user", "content": "the 12"}])
    assert text == "<|im_start|>user\nthe 12<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_text("<|im_end|> the 12")[:2] == (2, TOKENS.index("Ġthe"))


def test_a_template_without_bound_is_stopped(cache, tmp_path):
    template = "{% for i in range(100000) %}{{ 'x' * 100000 }}{% endfor %}"
    path = write_model(tmp_path / "m.gguf", template=template).path
    folder = as_folder(path, print)
    with pytest.raises(LocalRLError, match="characters"):
        load_model(folder)


def test_quantize_on_load(cache, tmp_path):
    half = as_folder(write_model(tmp_path / "a.gguf", kind="F16").path, print)
    model = load_model(half, quantize=4).model
    assert model.model.layers[0].mlp.up_proj.bits == 4
    mixed = as_folder(write_model(tmp_path / "b.gguf", kind={"token_embd": "Q8_0"}).path, print)
    assert load_model(mixed, quantize=4).model.model.embed_tokens.bits == 8
    with pytest.raises(ConfigError, match="already quantised"):
        load_model(mixed, quantize=8)


@pytest.mark.parametrize(
    ("architecture", "extra", "message"),
    [
        ("llama", {"llama.expert_count": 8}, "expert_count is 8"),
        ("llama", {"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ("llama", {"llama.attention.head_count_kv": 3}, "3 key heads"),
        ("llama", {"llama.embedding_length": 512}, "its settings require"),
        ("llama", {"llama.block_count": 3}, "it lacks 9 tensors"),
        ("llama", {"llama.block_count": 1}, "9 of its tensors are unexpected"),
        ("llama", {"llama.block_count": 1 << 30}, "block_count is impossible"),
        ("llama", {"llama.block_count": "two"}, "not a whole number"),
        ("llama", {"llama.rope.freq_base": float("nan")}, "freq_base is impossible"),
        ("qwen3", {"qwen3.rope.scaling.type": "longrope"}, "'longrope'"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False, False]}, "pattern"),
        (
            "llama",
            {"general.architecture": "mamba"},
            "family 'mamba' cannot be read, only those of",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(cache, tmp_path, architecture, extra, message):
    path = write_model(tmp_path / "m.gguf", architecture, extra=extra).path
    with pytest.raises(ConfigError, match=message):
        as_folder(path, print)
    assert not cache.exists()


def test_numbers_that_are_not_finite_are_refused(cache, tmp_path):
    path = write_model(tmp_path / "m.gguf", kind="Q4_1").path
    data = bytearray(path.read_bytes())
    file = read_gguf(path)
    place = file.tensors["blk.1.ffn_up.weight"].offset
    data[place : place + 2] = np.float16("inf").tobytes()
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up\.weight.* not finite"):
        as_folder(path, print)
    assert os.listdir(cache) == []


def test_no_room_on_the_disk(cache, tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf").path
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="Free some space"):
        as_folder(path, print)
    assert not cache.exists()


def test_without_the_gguf_package_the_extra_is_named(cache, tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf", kind="Q6_K").path
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'localrl\[gguf\]'"):
        as_folder(path, print)
    assert os.listdir(cache) == []


def test_a_folder_without_a_record_is_not_written_over(cache, tmp_path):
    path = write_model(tmp_path / "m.gguf").path
    folder = as_folder(path, print)
    (folder / "gguf.json").write_text("{}")
    with pytest.raises(ConfigError, match="delete the existing folder"):
        as_folder(path, print)
    assert os.listdir(cache) == [folder.name]


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen2", {}),
        ("qwen3", {"rope_scaling": YARN}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ],
)
def test_settings_and_names_go_both_ways(cache, tmp_path, architecture, change):
    """What a writer of GGUF makes of a config.json, the reader makes a config.json of again."""
    config, family = {**CONFIGS[architecture], **change}, FAMILIES[architecture]
    tensors, factors = {}, rope_factors(config)
    if factors is not None:
        tensors = {"rope_freqs.weight": factors}
    written = metadata_of(family, config)
    path = tmp_path / "m.gguf"
    write_model(path, architecture, config=change, extra=written, tensors=tensors)
    file = read_gguf(path)
    again = config_of(file, family)
    assert metadata_of(family, again) == written
    assert {name: again[name] for name in config if name != "sliding_window"} == {
        name: value for name, value in config.items() if name != "sliding_window"
    }
    assert set(tensor_names(family, config)) == set(file.tensors) - {"rope_freqs.weight"}
    assert family_of(config["model_type"]) is family
    rows = np.arange(4 * 6 * 3).reshape(24, 3)
    assert np.array_equal(to_halves(to_pairs(rows, 4), 4), rows)
