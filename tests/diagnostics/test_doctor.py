"""`localrl doctor`: its rows, what they say, and its exit code."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny
from click.testing import CliRunner

from localrl import backend
from localrl.cli.doctor import doctor
from localrl.diagnostics import doctor as checks
from localrl.diagnostics.doctor import disk_row, look_at_model, package_row
from localrl.diagnostics.doctor_machine import blas_speed_row, memory_rows, pair_rows, speed_row
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.forest import LevelState
from localrl.memory.limit import show
from localrl.memory.machine import Machine, mac

kernels = backend.describe().device == "cpu"
"""True if there is a row for them: on any CPU, also where none in C was built."""


def found(name, **wishes):
    return {row.id: row for row in look_at_model(str(name), **wishes)}


@pytest.fixture(scope="module")
def rows():
    return {row.id: row for row in checks.look_at_machine()}


def test_this_machine_is_fit(rows):
    assert list(rows)[:2] == ["python", "package.mlx"]
    assert {"device", "blas", "disk", "sandbox", "token"} <= set(rows)
    assert {"memory", "memory.limit", "blas.speed", "decode.speed"} <= set(rows)
    assert not [row for row in rows.values() if row.status == "fail"]
    assert all(row.todo for row in rows.values() if row.status == "warn")


def test_the_token_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    row = checks._token()
    assert "is set" in row.text
    assert "hf_secret" not in str(row)


def test_versions():
    assert package_row("mlx", "0.32.2").status == "ok"
    assert package_row("mlx", "0.33").status == "ok"
    assert package_row("numpy", "2.1.0rc1").status == "ok"
    old = package_row("jinja2", "3.1.5")
    assert (old.status, old.todo) == ("fail", "pip install --upgrade 'jinja2>=3.1.6'")
    assert package_row("mlx-lm", None).status == "fail"


def test_packages_that_belong_together():
    found = {"mlx": "0.32.4", "mlx-metal": "0.32.2", "mlx-cpu": "0.32.4", "mlx-cuda-12": None}
    metal, cpu = pair_rows(found)
    assert (metal.id, metal.status, cpu.id, cpu.status) == (
        "pair.mlx-metal", "fail", "pair.mlx-cpu", "ok",
    )  # fmt: skip
    assert metal.text == "mlx 0.32.4 and mlx-metal 0.32.2 must have the same version"
    assert metal.todo == "pip install --force-reinstall --no-deps 'mlx-metal==0.32.4'"
    assert list(pair_rows({"mlx": None, "mlx-metal": "0.32.4"})) == []


def memory(machine):
    return {row.id: row for row in memory_rows(machine)}


def test_memory_of_a_healthy_mac():
    rows = memory(replace(mac(16), swap_used_bytes=10**9))
    assert [row.status for row in rows.values()] == ["ok", "ok"]
    assert rows["memory"].text == (
        "17.2 GB in all, 6.4 GB available, swap used 1.0 GB, pressure normal"
    )
    limit = rows["memory.limit"].text
    # What other tests left with MLX may be held on: it is added to what is available.
    assert re.match(r"MLX may hold 6\.\d GB: the available memory, out of 17\.2 GB;", limit)
    assert limit.endswith("this process holds 537 MB now")


@pytest.mark.parametrize(
    "change", [{"pressure": "warn"}, {"pressure": "critical"}, {"swap_used_bytes": 5 * 2**30}]
)
def test_memory_that_is_short(change):
    row = memory(replace(mac(16), **change))["memory"]
    assert row.status == "warn"
    assert row.todo


def test_a_limit_too_small_for_a_model():
    row = memory(replace(mac(16), available_bytes=10**8))["memory.limit"]
    assert row.status == "warn"
    assert "--memory-limit" in str(row.todo)


def test_memory_of_a_container():
    inside = Machine("Linux", "cpu", container_limit_bytes=4 * 10**9, container_bytes=3 * 10**9)
    rows = memory(inside)
    assert "container 4.0 GB, 3.0 GB left" in rows["memory"].text
    assert "80 % of memory left to this container" in rows["memory.limit"].text


def test_memory_that_is_unknown():
    rows = memory(Machine("Linux", "cpu"))
    assert rows["memory"].text == (
        "unknown in all, unknown available, swap used unknown, pressure unknown"
    )
    assert rows["memory.limit"].status == "warn"
    assert "available memory cannot be read" in rows["memory.limit"].text


def test_products_that_are_slow():
    """2 * (128**3 + 256**3 + 384**3) = 150,994,944 operations."""
    slow = speed_row(0.0301, 0.015)
    assert slow.status == "warn"
    assert slow.text == "matrix products: MLX 5.0, NumPy 10.1 GFLOP/s: MLX takes 2.0 times as long"
    assert speed_row(0.03, 0.015).status == "ok"
    assert blas_speed_row("metal") is None


def test_speeds_are_numbers(rows):
    products = re.search(r"MLX ([\d.]+), NumPy ([\d.]+) GFLOP/s", rows["blas.speed"].text)
    assert products is not None
    assert float(products[1]) > 0
    decoded = re.search(
        r"(\d+) tokens/s at 1 row, (\d+) tokens/s at 16 rows", rows["decode.speed"].text
    )
    assert decoded is not None
    assert int(decoded[1]) > 0
    assert int(decoded[2]) > 0


def test_disk():
    assert disk_row(3_000_000_000).status == "ok"
    assert disk_row(1_000_000_000).status == "warn"
    assert disk_row(1_000_000).status == "fail"


CHECKS = (
    "body_and_head",
    "padded_prompts",
    "forked_rows",
    "shared_prompts",
    "layers_together",
    "forest_mean",
    "forest_p99",
    "recomputed_gradient",
)


def test_a_model_and_its_paths(tiny_folder):
    rows = found(tiny_folder)
    assert [*rows] == [
        "model", "family", "sizes", *(["kernels"] if kernels else []), "quantisation", "dtype",
        "batches", "head", "shared_prefix", *(f"check.{name}" for name in CHECKS), "tokenizer",
        "template", "end_of_turn", "prompt",
    ]  # fmt: skip
    assert {name for name, row in rows.items() if row.status != "ok"} == {"end_of_turn"}
    assert "no end was found by rendering" in rows["end_of_turn"].text
    assert rows["family"].text == "qwen3"
    assert rows["quantisation"].text == "4 bits"
    assert rows["prompt"].text == "'<user>What is 2 + 3?<assistant>' (16 tokens)"


def test_a_family_with_another_path(tmp_path, monkeypatch):
    monkeypatch.setattr(LevelState, "_begin", lambda self, parents: None)  # a prefix is forgotten
    rows = found(tiny.make_folder(tmp_path / "lfm2", bits=None, **tiny.FAMILIES["lfm2"]))
    assert rows["shared_prefix"].status == rows["check.forest_mean"].status == "warn"
    cost = 8 * (512 + 256) / (512 + 8 * 256)  # of the default lengths in a group of 8
    assert f"{cost:.1f} times the positions" in rows["shared_prefix"].text
    assert re.fullmatch(
        r"0\.\d+ \(warns above 0.01, refuses above 0.06\)", rows["check.forest_mean"].text
    )
    assert re.fullmatch(r"\d(\.\d+)?e-0\d \(.*", rows["check.padded_prompts"].text)
    assert rows["batches"].status == "ok"
    assert rows["quantisation"].text == "not quantised"


def test_a_head_that_cannot_be_separated_says_what_it_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(MLXEngine, "splits_head", False)
    folder = tiny.make_folder(tmp_path / "lfm2", bits=None, **tiny.FAMILIES["lfm2"])
    row = found(folder)["head"]
    assert row.status == "warn"
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert show(4 * (512 + 256) * vocabulary) in row.text


def test_quantising_is_tried(tmp_path):
    rows = found(tiny.make_folder(tmp_path / "model", bits=None), quantize=8)
    assert rows["quantisation"].text == "8 bits"


def test_a_model_that_is_refused_ends_the_list(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    rows = found(folder)
    assert rows["model"].status == "fail"
    assert "own.py" in rows["model"].text


def test_a_template_that_fails_is_told(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    changed = {**json.loads(path.read_text()), "chat_template": "{{ raise_exception('no') }}"}
    path.write_text(json.dumps(changed))
    rows = found(folder)
    assert rows["template"].status == "fail"
    assert "prompt" not in rows


def test_the_command_says_it_all_as_json_and_fails_where_something_fails(tiny_folder):
    run = CliRunner().invoke
    fit = run(doctor, ["--model", str(tiny_folder), "--json"])
    assert fit.exit_code == 0
    ids = [row["id"] for row in json.loads(fit.stdout)["rows"]]
    assert ids[0] == "python"
    assert ids[-1] == "prompt"
    broken = run(doctor, ["--model", "nowhere"])
    assert broken.exit_code == 1
    assert "FAIL  model" in broken.stdout
    assert "There is no model in nowhere" in broken.stdout
