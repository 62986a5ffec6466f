"""A model with its adapter becomes a GGUF file that is the same model when it is read again."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import replace
from functools import reduce
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from texts import texts
from written import TOKENS, write_model

from localrl.backend import mx
from localrl.cli.export import export
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.export.adapters import adapter_of, write_adapter
from localrl.export.fused import median
from localrl.export.gguf import export_gguf
from localrl.gguf.convert import as_folder
from localrl.gguf.reader import read_gguf
from localrl.policy.lora import LoRALinear
from localrl.policy.model import load_model
from localrl.policy.precision import dequantise, to_float32
from localrl.policy.tokenizer import load_tokenizer

IDS = mx.array([[7, 30, 2, 201, 99, 5, 5, 160, 17, 44, 3, 90, 12, 13, 14, 200, 201, 8, 77, 150]])
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
TYPES = {8: "Q8_0", 16: "F16"}
BASES = {8: "Q4_1", 16: "F16"}
"""In which types the numbers of the base are, for each type of a file."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def a_base(tmp_path, architecture="llama", kind="F16", **options):
    path = write_model(tmp_path / "base.gguf", architecture, kind, **options).path
    return as_folder(path, lambda _: None)


def a_policy(folder, size=0.05):
    policy = make_policy(load_model(folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=True)
    tiny.stir(policy.model, seed=1, size=size)
    return policy


def rounded(policy, bits):
    """Logits of the model with its update added in and each matrix rounded, all worked out here."""
    inside, parameters = policy.model, []
    for path, module in inside.named_modules():
        if isinstance(module, LoRALinear):
            update = module.scale * np.array(module.lora_b).T @ np.array(module.lora_a).T
            weight = _round(np.array(module.linear.weight) + update, bits)
            parameters += [(f"{path}.linear.weight", weight), (f"{path}.scale", 0.0)]
        elif "weight" in module and module.weight.ndim == 2 and not path.endswith(".linear"):
            parameters.append((f"{path}.weight", _round(np.array(module.weight), bits)))
    for path, value in parameters:
        *way, name = path.split(".")
        setattr(reduce(_member, way, inside), name, value)
    return np.array(inside(IDS))


def _round(values, bits):
    kind = gguf.GGMLQuantizationType[TYPES[bits]]
    return mx.array(gguf.dequantize(gguf.quantize(values, kind), kind))


def _member(module, name):
    return module[int(name)] if name.isdecimal() else getattr(module, name)


def logits_of(folder):
    model = load_model(folder).model
    dequantise(model, as_float32=True)
    to_float32(model)
    return np.array(model(IDS))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_file_read_again_is_the_same_model(tmp_path, architecture, bits):
    folder = a_base(tmp_path, architecture, BASES[bits])
    policy = a_policy(folder)
    adapter = adapter_of(policy.model, base_id="Some/Model")
    before = np.array(policy.model(IDS))
    made = export_gguf(adapter, folder, tmp_path / "new" / "out.gguf", bits=bits)
    again = as_folder(made.path, lambda _: None)
    expected = rounded(policy, bits)
    assert np.abs(logits_of(again) - expected).max() < 1e-3
    assert np.abs(expected - logits_of(folder)).max() > 0.1  # the update does something
    assert (expected - before).std() < (0.1 if bits == 8 else 0.01) * before.std()
    assert made.rounding < (0.006 if bits == 8 else 0.0003)
    assert median([layer.share for layer in made.layers]) == pytest.approx(1, abs=0.01)
    assert os.listdir(made.path.parent) == ["out.gguf"]
    assert made.size == made.path.stat().st_size
    _same_words(folder, again)
    _same_settings(folder, again)
    kinds = {len(t.shape): t.type.name for t in read_gguf(made.path).tensors.values()}
    assert kinds == {1: "F32", 2: TYPES[bits]}


def _same_words(folder, again):
    one, other = load_tokenizer(folder), load_tokenizer(again)
    found = texts()
    assert len(found) > 50
    assert [one.encode_text(t) for t in found] == [other.encode_text(t) for t in found]
    assert one.inner.chat_template == other.inner.chat_template
    assert one.inner.special_tokens_map == other.inner.special_tokens_map
    assert one.end_ids == other.end_ids


def _same_settings(folder, again):
    one, other = (load_model(place).model.args for place in (folder, again))
    assert dataclasses.asdict(one) == dataclasses.asdict(other)


def test_llama_3_s_rotary_factors_are_written(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    folder = a_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    policy = a_policy(folder)
    made = export_gguf(adapter_of(policy.model), folder, tmp_path / "out.gguf", bits=16)
    again = as_folder(made.path, lambda _: None)
    assert json.loads((again / "config.json").read_text())["rope_scaling"] == scaling
    assert np.abs(logits_of(again) - rounded(policy, 16)).max() < 1e-3


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_traditional": True}, "rope_traditional"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ("llama", {"model_type": "phi3"}, "does not support models of type 'phi3'"),
    ],
)
def test_what_gguf_has_no_place_for_is_refused(tmp_path, architecture, changes, message):
    folder = a_base(tmp_path, architecture)
    adapter = adapter_of(a_policy(folder).model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=message):
        export_gguf(adapter, folder, tmp_path / "new" / "out.gguf")
    assert not (tmp_path / "new").exists()


def test_another_tokenizer_is_refused(tmp_path, tiny_folder):
    """One of words, and a byte-level one that cuts texts in a way without a name."""
    adapter = adapter_of(a_policy(tiny_folder).model)
    with pytest.raises(ConfigError, match="'WordLevel', not BPE"):
        export_gguf(adapter, tiny_folder, tmp_path / "out.gguf")
    folder = a_base(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,7}"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"splits text with .*\{1,7\}"):
        export_gguf(adapter_of(a_policy(folder).model), folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_numbers_that_do_not_fit_leave_nothing_behind(tmp_path):
    folder = a_base(tmp_path)
    adapter = adapter_of(a_policy(folder).model)
    name = next(name for name in adapter.weights if "lora_b" in name)
    huge = replace(adapter, weights={**adapter.weights, name: adapter.weights[name] * 1e7})
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match="do not fit into F16"):
        export_gguf(huge, folder, tmp_path / "new" / "out.gguf", bits=16)
    assert os.listdir(tmp_path / "new") == []


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    folder = a_base(tmp_path)
    adapter = adapter_of(a_policy(folder).model)
    usage = SimpleNamespace(total=10**9, used=10**9, free=10**5)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"takes 0.0 GB, but its disk has only 0.0 GB free"):
        export_gguf(adapter, folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_command_writes_a_file_and_says_what_is_in_it(tmp_path):
    folder = a_base(tmp_path, extra={"general.license": "apache-2.0"})
    write_adapter(adapter_of(a_policy(folder).model), tmp_path / "adapter")
    file = tmp_path / "model.gguf"
    arguments = [str(tmp_path / "adapter"), "--model", str(folder), "--base-id", "Some/Model"]
    done = CliRunner().invoke(export, [*arguments, "--gguf", str(file)])
    assert done.exit_code == 0, done.exception
    assert done.output.startswith(f"gguf     Q8_0, 1 MB, to {file}\nrounding 0.0054 of the weights")
    assert "kept     1.00 of the update; rounding is 0.038 times its size" in done.output
    metadata = read_gguf(file).metadata
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.base_model.0.repo_url"].endswith("/Some/Model")
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.tokens"][: len(TOKENS)] == list(TOKENS)
    again = CliRunner().invoke(export, [*arguments, "--gguf", str(file)])
    assert "exists. Name another file" in str(again.exception)


def test_a_small_update_is_in_the_file_although_rounding_is_larger(tmp_path):
    folder = a_base(tmp_path)
    write_adapter(adapter_of(a_policy(folder, size=0.0005).model), tmp_path / "adapter")
    arguments = [str(tmp_path / "adapter"), "--model", str(folder), "--gguf"]
    done = CliRunner().invoke(export, [*arguments, str(tmp_path / "model.gguf")])
    assert done.exit_code == 0, done.exception
    assert "note: rounding is larger than the learned update; --bits 16" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "16"], "--bits needs --gguf"),
        (["--gguf", "x.gguf", "--fused"], "--fused cannot be combined with --gguf"),
        (["--gguf", "x.gguf", "--out", "new"], "--out cannot be combined with --gguf"),
        (["--gguf"], "Name a new file after --gguf"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, arguments, message):
    folder = a_base(tmp_path)
    write_adapter(adapter_of(a_policy(folder).model), tmp_path / "adapter")
    places = [str(tmp_path / "adapter"), "--model", str(folder)]
    done = CliRunner().invoke(export, [*places, *arguments])
    assert message in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 2


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    folder = a_base(tmp_path)
    adapter = adapter_of(a_policy(folder).model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'localrl\[gguf\]'"):
        export_gguf(adapter, folder, tmp_path / "out.gguf")
