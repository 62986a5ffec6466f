"""`localrl serve`: what is served under which name, and what is refused before a load."""

from __future__ import annotations

import pytest
import tiny
from click.testing import CliRunner

from localrl.cli.main import cli
from localrl.cli.serve import _names, _split
from localrl.config import RunConfig
from localrl.errors import LocalRLError


@pytest.mark.parametrize(
    ("model", "adapter", "names"),
    [
        (None, None, ("steps-0.8m", None)),
        ("user/tiny", None, ("user/tiny", None)),
        ("smollm2-135m", "runs/sums-1/adapter", ("smollm2-135m", "sums-1")),
        ("models/tiny", "adapters/mine", ("tiny", "mine")),
        ("models/file.Q4_1.gguf", "models/file.Q4_1", ("file.Q4_1", "file.Q4_1-adapter")),
    ],
)
def test_the_names_say_what_was_loaded(tmp_path, monkeypatch, model, adapter, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "file.Q4_1.gguf").touch()
    found = _names(RunConfig.create({"model.path": model, "lora.adapter": adapter}), None)
    assert (found.base, found.adapter) == names


def test_a_run_gives_its_own_name(tmp_path, monkeypatch):
    run = tmp_path / "sums-3"
    (run / "adapter").mkdir(parents=True)
    (run / "config.toml").touch()
    config = RunConfig.create({"lora.adapter": str(run / "adapter")})
    monkeypatch.chdir(run)
    for place in (str(run), "."):
        found, model = _split(place)
        assert model is None
        assert _names(config, found).adapter == "sums-3"
    assert _split("models/tiny") == (None, "models/tiny")


def failed(*words) -> str:
    done = CliRunner().invoke(cli, ["serve", *map(str, words)])
    assert isinstance(done.exception, LocalRLError) or done.exit_code == 1
    return f"{done.exception} {done.output}"


def test_what_cannot_be_served_is_told(tmp_path):
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    for folder, file in ((run, "config.toml"), (adapter, "adapter_config.json")):
        folder.mkdir()
        (folder / file).touch()
    assert "has no adapter yet" in failed(run)
    assert "is an adapter. Name its model, and it with --adapter" in failed(adapter)
    assert "user/none" in failed("user/none")
    assert "nowhere" in failed(tmp_path / "nowhere")
    model = tiny.make_folder(tmp_path / "model")
    assert "cannot be served on 192.0.2.1" in failed(model, "--host", "192.0.2.1")
