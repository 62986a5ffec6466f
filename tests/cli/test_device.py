"""`--device cpu` reaches every command that computes, before it computes anything."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from localrl import backend
from localrl.cli.main import cli
from localrl.config import RunConfig
from localrl.errors import LocalRLError


class Switched(LocalRLError):
    """Ends a command where it chooses its device."""


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--no-supervise", "--out", "run"],
        ["eval"],
        ["chat"],
        ["doctor"],
        ["plan"],
        ["bench"],
        ["bench", "--shape", "qwen3-0.6b", "--model", "MODEL"],
        ["export", "MODEL", "--model", "MODEL"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_cpu_is_chosen_first(tmp_path, tiny_folder, monkeypatch, command):
    def compute_on_cpu(wanted):
        raise Switched(f"on the CPU: {wanted}")

    monkeypatch.setattr(backend, "compute_on_cpu", compute_on_cpu)
    monkeypatch.setattr(backend, "describe", lambda: pytest.fail("asked for the device too early"))
    monkeypatch.chdir(tmp_path)
    if command[0] == "export":  # an adapter folder is enough to get that far
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        command = ["export", "adapter", *command[2:]]
    given = [str(tiny_folder) if part == "MODEL" else part for part in command]
    for flags, wanted in ((["--device", "cpu"], True), ([], False)):
        told = CliRunner().invoke(cli, [*given, *flags])
        assert f"on the CPU: {wanted}" in told.output + str(told.exception), told.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "on_cpu"),
    [({}, False), ({"model.device": "cpu"}, True), ({"model.engine": "cpu"}, True)],
)
def test_what_keeps_a_gpu_out(settings, on_cpu):
    assert RunConfig.create(settings).model.on_cpu is on_cpu
