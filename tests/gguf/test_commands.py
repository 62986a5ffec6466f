"""Commands that get a GGUF file: as with a folder, and exit code 2 where it is not sound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from written import write_model

from localrl.cli.main import cli


@pytest.fixture
def localrl(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "localrl", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200"},
        )

    return run


def test_plan_and_train(localrl, tmp_path):
    path = write_model(tmp_path / "m.gguf", kind="Q4_1").path
    planned = localrl("plan", "--model", path)
    assert planned.returncode == 0, planned.stderr
    assert planned.stderr.startswith("m.gguf is GGUF: converting it once, to ")
    small = ("rollout.group_size=2", "rollout.max_completion_tokens=4", "task.eval_prompts=2")
    settings = [part for one in small for part in ("--set", one)]
    out = tmp_path / "run"
    done = localrl("train", "--model", path, "--steps", 1, "--out", out, *settings)
    assert done.returncode == 0, done.stderr
    assert "converting" not in done.stderr
    assert (out / "adapter" / "adapters.safetensors").is_file()


@pytest.mark.parametrize("command", ["plan", "eval"])
def test_a_truncated_file(localrl, tmp_path, command):
    path = write_model(tmp_path / "m.gguf").path
    path.write_bytes(path.read_bytes()[:-1000])
    done = localrl(command, "--model", path)
    assert done.returncode == 2
    assert "truncated or damaged" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not (tmp_path / "cache" / "localrl" / "gguf").exists()


def test_chat_calls_a_model_by_its_file(tmp_path):
    file = write_model(tmp_path / "Small-Q4.gguf").path
    done = CliRunner().invoke(cli, ["chat", "--model", str(file)], input="/quit\n")
    assert done.stderr.splitlines()[-1].startswith("Small-Q4.gguf, temperature 1")
