"""Model folders that want to run code, read other files, or eat the memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import pytest
import tiny

from localrl.errors import ConfigError
from localrl.policy import folder as model_folder
from localrl.policy.folder import VALUES, check_folder
from localrl.policy.model import load_model
from localrl.policy.tokenizer import load_tokenizer


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(path: Path, **changes) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **changes}))


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def write_code(folder: Path, canary: Path) -> None:
    (folder / "own.py").write_text(
        f"open({str(canary)!r}, 'w')\nclass Own:\n    def __init__(self, *a, **k): pass\n"
    )


def test_a_sound_folder_is_loaded(folder):
    assert check_folder(folder)["model_type"] == "qwen3"
    load_model(folder)


def test_a_model_of_its_own_code_is_refused(folder, tmp_path):
    write_code(folder, tmp_path / "canary")
    change(folder / "config.json", model_file="own.py")
    refuse(folder, r"its own code \('own\.py'\)")
    change(folder / "config.json", model_file=None, model_type="own", auto_map={"A": "own.Own"})
    refuse(folder, r"own not supported.*auto_map")
    assert not (tmp_path / "canary").exists()


def test_code_beside_a_known_family_is_never_run(folder, tmp_path):
    write_code(folder, tmp_path / "canary")
    mapped = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"}
    change(folder / "config.json", auto_map=mapped)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    load_model(folder)
    change(folder / "tokenizer_config.json", tokenizer_class="Own")
    (folder / "tokenizer.json").unlink()  # with it, transformers needs no class of its own
    refuse(folder, "Cannot load the tokenizer")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("family", ["../../own", "own/own", "switch_layers", "", 5, None, "a" * 99])
def test_a_family_that_is_none_is_refused(folder, family):
    change(folder / "config.json", model_type=family)
    refuse(folder, "model_type|Cannot load the model")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_pickles_are_never_opened(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    load_model(folder)
    (folder / "model.safetensors").unlink()
    refuse(folder, r"pytorch_model\.bin; localrl reads only safetensors")
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes())
    refuse(folder, "not a valid safetensors file")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a\\b", "..", "", 5, "a/model.safetensors"]
)
def test_weights_are_beside_their_index(folder, name):
    change(folder / "model.safetensors.index.json", weight_map={"a": name})
    refuse(folder, "as a weight file; only files next to it")


def test_a_weight_file_that_is_not_there_is_named(folder):
    names = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    change(folder / "model.safetensors.index.json", weight_map=names)
    refuse(folder, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "merges_file"])
def test_a_tokenizer_names_no_files_elsewhere(folder, name):
    change(folder / "tokenizer_config.json", **{name: "../.env"})
    refuse(folder, rf"'\.\./\.env' as {name}")


def test_a_tokenizer_names_no_modules_elsewhere(folder):
    change(folder / "tokenizer_config.json", chat_template_type="..own")
    refuse(folder, "chat_template_type")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_do_not_lead_out(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refuse(folder, "outside the model's folder")


def test_further_templates_are_looked_at_too(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").symlink_to(tmp_path / "secret")
    refuse(folder, "outside the model's folder")


def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    refuse(folder, "not a regular file")


def test_large_json_is_refused_unread(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(200_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(folder, "200000000 bytes; at most 4000000")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]
)
def test_deep_json_is_refused(folder, name):
    (folder / name).write_text('{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}")
    refuse(folder, "too deeply|Cannot load the tokenizer")


def test_json_of_very_many_values_is_refused(folder):
    (folder / "tokenizer.json").write_text("[" + "[]," * VALUES + "0]")
    refuse(folder, "JSON values; at most")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "at most 54 is possible"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 10**9}, "num_attention_heads"),
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"text_config": []}, "text_config is not an object"),
        ({"vocab_size": 10**15}, "impossible sizes"),
        ({"hidden_size": 0}, "impossible sizes"),
        ({"hidden_size": "wide"}, "impossible sizes"),
        ({"hidden_size": 2**30}, "Cannot load the model"),
        ({"intermediate_size": "wide"}, "Cannot load the model"),
    ],
)
def test_absurd_numbers_are_refused(folder, changes, message):
    change(folder / "config.json", **changes)
    refuse(folder, message)


def test_numbers_of_very_many_digits_are_refused(folder):
    (folder / "config.json").write_text('{"vocab_size": ' + "9" * 1_000_000 + "}")
    refuse(folder, "not valid JSON")


@pytest.mark.parametrize("size", [2**62, 2**40, 99_000_000, 10])
def test_absurd_headers_of_weights_are_refused(folder, size):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    refuse(folder, "not a valid safetensors file")


def test_weights_that_lie_over_each_other_are_refused(folder):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    refuse(folder, "not a valid safetensors file")


def test_very_many_files_are_refused(folder, monkeypatch):
    monkeypatch.setattr(model_folder, "ENTRIES", 20)
    for number in range(20):
        os.link(folder / "config.json", folder / f"{number}.json")
    refuse(folder, "more than 20 files")


def test_a_tokenizer_alone_is_looked_at_as_well(folder):
    (folder / "model.safetensors").unlink()
    load_tokenizer(folder)
    change(folder / "tokenizer_config.json", vocab_file="/etc/passwd")
    with pytest.raises(ConfigError, match="as vocab_file"):
        load_tokenizer(folder)


def test_a_base_model_without_end_token_or_tokenizer_is_told(folder):
    (folder / "tokenizer.json").write_text("{}")
    refuse(folder, "Cannot load the tokenizer")
    shutil.rmtree(folder)
    tiny.make_folder(folder, eos_token_id=None)
    load_model(folder)
