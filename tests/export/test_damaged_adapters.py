"""Adapter folders that are damaged, of another kind, or half written: refused, naming the file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_folders import a_policy, change_config, change_weights, equal, write, write_foreign

from localrl.backend import mx
from localrl.errors import CheckpointError, ConfigError
from localrl.export import peft
from localrl.export.adapters import adapter_of, read_adapter, write_adapter


@pytest.fixture
def written(tmp_path, tiny_folder):
    return write(tiny_folder, tmp_path / "a")


@pytest.fixture
def foreign(tmp_path, tiny_folder):
    return write_foreign(tiny_folder, tmp_path / "a")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_a_damaged_folder_of_ours_is_refused(tmp_path, tiny_folder, written, name, damage):
    file = written / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-9] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-8])
    elif damage == "remove":
        file.unlink()
    else:  # the weights of another adapter: a write that was cut off
        other = adapter_of(a_policy(tiny_folder, stirred=False).model)
        write_adapter(other, tmp_path / "b")
        shutil.copy(tmp_path / "b" / name, file)
    with pytest.raises(CheckpointError, match=name):
        read_adapter(written)


def test_a_changed_scale_is_refused(written):
    lora = json.loads((written / "adapter_config.json").read_text())["lora_parameters"]
    change_config(written, lora_parameters={**lora, "scale": 3.0})
    with pytest.raises(CheckpointError, match="says scale 3"):
        read_adapter(written)


def test_a_cut_off_folder_of_others_is_refused(foreign):
    file = foreign / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors cannot be read"):
        read_adapter(foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.0.mlp.up_proj.lora_a"), "lora_a is missing"),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.lora_b": mx.full((4, 128), mx.nan)}),
            "up_proj.lora_b contains NaN",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.lora_a": mx.zeros((4, 64))}),
            "does not match rank 4",
        ),
        (lambda w: w.update({"model.norm.weight": mx.zeros((4,))}), "no.* part of a LoRA"),
    ],
)
def test_a_wrong_folder_of_others_is_refused(foreign, change, message):
    change_weights(foreign / "adapters.safetensors", change)
    with pytest.raises(CheckpointError, match=f"adapters.safetensors: .*{message}"):
        read_adapter(foreign)


def test_a_layer_missing_whole_is_found_at_the_model(tiny_folder, foreign):
    def drop(weights):
        for half in "ab":
            del weights[f"model.layers.0.mlp.up_proj.lora_{half}"]

    change_weights(foreign / "adapters.safetensors", drop)
    adapter = read_adapter(foreign)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.lora_a is no such tensor"):
        a_policy(tiny_folder, keys=adapter.keys, weights=adapter.weights, source=foreign)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "dora"}, "'dora'; only lora"),
        ({"fine_tune_type": "full"}, "'full'; only lora"),
    ],
)
def test_other_kinds_are_refused(foreign, changes, message):
    change_config(foreign, **changes)
    with pytest.raises(ConfigError, match=message):
        read_adapter(foreign)


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"rank_pattern": {"q": 1}}],
)
def test_other_kinds_of_peft_are_refused(written, changes):
    config = json.loads((written / "adapter_config.json").read_text()) | changes
    tensors = mx.load(str(written / "adapter_model.safetensors"))
    with pytest.raises(ConfigError, match="only plain LoRA"):
        peft.from_peft(config, tensors, written / "adapter_model.safetensors")


def test_no_adapter_at_all(tmp_path):
    with pytest.raises(ConfigError, match="no adapter in"):
        read_adapter(tmp_path)


def test_nan_is_not_written(tmp_path, tiny_folder):
    adapter = adapter_of(a_policy(tiny_folder).model)
    name = next(iter(adapter.weights))
    broken = {**adapter.weights, name: mx.full(adapter.weights[name].shape, mx.nan)}
    with pytest.raises(CheckpointError, match="contains NaN"):
        write_adapter(replace(adapter, weights=broken), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_write_that_breaks_off_is_never_a_mixture(
    tmp_path, tiny_folder, written, monkeypatch, done
):
    """After any number of the renames there is the old adapter, or none that can be read."""
    old = read_adapter(written)
    new = adapter_of(a_policy(tiny_folder, stirred=False).model)
    moves = iter(range(done))
    replace_file = Path.replace

    def move(path, target):
        if next(moves, None) is None:
            raise OSError("power cut")
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(CheckpointError, match="power cut"):
        write_adapter(new, written)
    if done == 0:
        equal(read_adapter(written).weights, old.weights)
    else:
        with pytest.raises(CheckpointError, match="checksum"):
            read_adapter(written)
    monkeypatch.undo()
    write_adapter(new, written)  # and it can be written again
    equal(read_adapter(written).weights, new.weights)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
