"""From a name to a loaded model: the cache, quantising on load, the rope trap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from localrl.backend import mx, nn
from localrl.errors import ConfigError
from localrl.policy.loading import find_model, shown_name
from localrl.policy.model import load_model, read_shape

TOKENS = mx.array([[1, 5, 9, 2, 7, 4, 4, 8]])


def logits(folder: Path, **wishes) -> np.ndarray:
    model = load_model(folder, **wishes).model
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))


def change_config(folder: Path, drop: tuple[str, ...] = (), **changes) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}))


def test_a_folder_comes_before_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny.make_folder(Path("user") / "name")
    assert find_model("user/name") == folder
    assert find_model(str(tmp_path / "user" / "name")) == tmp_path / "user" / "name"


def test_embedded_models_have_names_and_one_needs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_shape(find_model(None)).layers == 4
    assert find_model("steps-0.8m") == find_model(None)
    (tmp_path / "steps-0.8m").mkdir()
    assert find_model("steps-0.8m") == Path("steps-0.8m")


def test_what_is_not_here_is_told_with_the_command_that_fetches_it():
    with pytest.raises(ConfigError, match="`localrl pull nobody/nothing`"):
        find_model("nobody/nothing")


def test_a_plain_word_is_a_folder():
    with pytest.raises(ConfigError, match="no model in nowhere"):
        load_model(find_model("nowhere"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "qwen3_moe", "gemma3_text"])
def test_rotary_settings_of_transformers_5_are_read(tmp_path, family):
    changes = {"rope_theta": 500.0}
    if family == "gemma3_text":
        changes["rope_local_base_freq"] = 77.0
    folder = tiny.make_folder(tmp_path / "old", **tiny.FAMILIES[family], **changes)
    expected = logits(folder)
    given = {"rope_type": "default", "rope_theta": 500.0}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 77.0}
        given = {"full_attention": given, "sliding_attention": local}
    change_config(folder, tuple(changes), rope_parameters=given)
    np.testing.assert_array_equal(logits(folder), expected)
    # The trap itself: with the key that the family does not know, it would compute something else.
    change_config(folder, rope_theta=10_000.0, rope_local_base_freq=10_000.0, rope_parameters=None)
    assert np.abs(logits(folder) - expected).max() > 1e-3


def test_scaled_rotary_settings_are_read(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = tiny.make_folder(tmp_path / "model", model_type="llama", rope_scaling=scaling)
    expected = logits(folder)
    change_config(
        folder,
        ("rope_theta", "rope_scaling"),
        rope_parameters={**scaling, "rope_theta": 10_000.0},
    )
    np.testing.assert_array_equal(logits(folder), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_type": "helical", "rope_theta": 500.0}, "helical"),
        ({"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}, "partial_"),
        ({"full_attention": {"rope_theta": 1.0}}, "full_attention"),
        (
            {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}},
            "sliding attention",
        ),
    ],
)
def test_rotary_settings_that_cannot_be_read_are_refused(tmp_path, given, message):
    folder = tiny.make_folder(tmp_path / "model", model_type="llama")
    change_config(folder, ("rope_theta",), rope_parameters=given)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_two_rotary_bases_are_refused(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", model_type="llama")
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(ConfigError, match=r"also has a different rope_theta 10000\.0"):
        load_model(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_on_load_is_as_stored_quantised(tmp_path, bits):
    stored = tiny.make_folder(tmp_path / "stored", bits=bits, hidden_size=96, head_dim=24)
    dense = tiny.make_folder(tmp_path / "dense", bits=None, hidden_size=96, head_dim=24)
    model = load_model(dense, quantize=bits).model
    sizes = {m.group_size for m in model.modules() if isinstance(m, nn.QuantizedLinear)}
    assert sizes == {32, 64}  # 96 is no multiple of 64; the width of the feed-forward layer is
    assert np.abs(logits(dense, quantize=bits) - logits(dense)).max() > 1e-3
    if bits == 8:
        np.testing.assert_allclose(logits(dense, quantize=8), logits(stored), atol=0.1)


def test_quantised_weights_are_not_quantised_again(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", bits=4)
    np.testing.assert_array_equal(logits(folder, quantize=4), logits(folder))
    with pytest.raises(ConfigError, match="already quantised to 4 bits"):
        load_model(folder, quantize=8)
    with pytest.raises(ConfigError, match=r"model\.quantize is 5"):
        load_model(folder, quantize=5)


def test_a_snapshot_of_links_is_a_model(tmp_path, tiny_folder):
    snapshot = tiny.make_cached(tiny_folder, tmp_path, "user/tiny")
    np.testing.assert_array_equal(logits(snapshot), logits(tiny_folder))


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """The Hub's cache, with one model in it; returns the folder that holds all of that model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tiny.make_cached(tiny_folder, tmp_path, "user/my-model").parents[1]


@pytest.mark.parametrize("below", ["", "snapshots", "blobs", "refs"])
def test_a_folder_of_the_hubs_cache_is_told_by_its_name(hub, below):
    with pytest.raises(ConfigError, match=r"no config.json.*Pass --model user/my-model\.$"):
        load_model(find_model(str(hub / below)))


def test_so_is_one_given_from_inside_the_cache(hub, monkeypatch):
    monkeypatch.chdir(hub.parent)
    with pytest.raises(ConfigError, match=r"Pass --model user/my-model\.$"):
        load_model(find_model(f"{hub.name}/"))


def test_another_programs_cache_is_told_by_its_snapshot(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"Pass --model \S+/models--user--my-model/snapshots/a+"):
        read_shape(hub)


def test_a_model_that_the_cache_has_in_part_is_fetched(hub):
    (snapshot,) = (hub / "snapshots").iterdir()
    (snapshot / "config.json").unlink()
    for place in (hub, snapshot):
        with pytest.raises(ConfigError, match=r"only a part of user/my-model.*`localrl pull user"):
            read_shape(place)


def test_a_folder_of_folders_names_one_of_them(tiny_folder):
    with pytest.raises(ConfigError, match=f"There is one in {tiny_folder}: pass that folder"):
        read_shape(tiny_folder.parent)


def test_people_are_shown_the_name_that_was_given(hub, tiny_folder, tmp_path):
    (snapshot,) = (hub / "snapshots").iterdir()
    blob = tmp_path / "0123abc"
    blob.touch()
    (tmp_path / "Small-Q4.gguf").symlink_to(blob)
    assert shown_name(None, Path("models/steps-0.8m")) == "steps-0.8m"
    assert shown_name("user/my-model", snapshot) == "user/my-model"
    assert shown_name(str(snapshot), snapshot) == "user/my-model"
    assert shown_name(str(tiny_folder), tiny_folder) == "tiny"
    assert shown_name("smollm2-135m", Path("cache/gguf/x-0123.1")) == "smollm2-135m"
    assert shown_name(str(tmp_path / "Small-Q4.gguf"), Path("cache/x-0123.1")) == "Small-Q4.gguf"
