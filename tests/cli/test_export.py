"""`localrl export` on a run of the demonstration, and a second program that reads what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from waiting import DEADLINE_S

from localrl.cli.export import export
from localrl.config import RunConfig
from localrl.embedded import embedded_model_path
from localrl.export.adapters import NOTE, read_adapter
from localrl.export.compare import greedy_pairs
from localrl.export.fused import export_fused
from localrl.train import train

PROMPT = "sum 80 55 75 77"
GENERATE = """
import sys, mlx_lm
fused, model, adapter, prompt = sys.argv[1:]
for places in ((fused, {}), (model, {"adapter_path": adapter})):
    loaded, tokenizer = mlx_lm.load(places[0], **places[1])
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    print("\\n---\\n" + mlx_lm.generate(loaded, tokenizer, ids, max_tokens=40), end="")
"""
"""The likeliest answers, by mlx-lm alone."""


def command(*arguments):
    return subprocess.run(
        [*map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "COLUMNS": "100"},
    )


def localrl(*arguments):
    return command(sys.executable, "-m", "localrl", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of the demonstration: the adapter that a real run left."""
    out = tmp_path_factory.mktemp("runs") / "demonstration"
    settings = {"run.steps": 2, "task.eval_prompts": 0, "run.out": str(out)}
    folder = train(RunConfig.create(settings)).folder
    config = folder / "config.toml"  # shorter texts to compare
    config.write_text(config.read_text().replace("completion_tokens = 64", "completion_tokens = 8"))
    return folder


def test_an_adapter_of_a_real_run_is_nearly_all_in_the_fused_model(run, tmp_path):
    from localrl.policy.tokenizer import load_tokenizer
    from localrl.tasks.builtin import load_task

    model, adapter = embedded_model_path(), read_adapter(run / "adapter")
    made = export_fused(adapter, model, tmp_path / "fused")
    assert made.dtype == "float16"
    assert len(made.layers) == 28
    assert min(layer.cosine for layer in made.layers) >= 0.98
    assert max(layer.error for layer in made.layers) <= 0.2
    tokenizer = load_tokenizer(model)
    examples = load_task("steps", train_prompts=256).evaluation(20)
    prompts = [tokenizer.encode(example.messages) for example in examples]
    pairs = list(
        greedy_pairs(adapter, model, made.folder, prompts, most=12, base_bits=0, on_cpu=True)
    )
    assert sum(one == other for one, other in pairs) >= 19


def test_a_fused_model_says_how_much_was_kept_and_is_read_by_mlx_lm(run):
    done = localrl("export", run, "--fused", "--base-id", "Some/Model")
    assert done.returncode == 0, done.stderr
    assert f"fused    {run / 'fused'} (float16: the update is" in done.stdout
    assert "cosine 0.99" in done.stdout
    assert "of 3 held-out prompts get the same text" in done.stdout
    assert 'base_model: "Some/Model"' in (run / "fused" / "README.md").read_text()
    refused = localrl("export", run, "--fused")
    assert refused.returncode == 2
    assert "exists and is not empty" in refused.stderr
    arguments = (run / "fused", embedded_model_path(), run / "adapter", PROMPT)
    done = command(sys.executable, "-c", GENERATE, *arguments)
    assert done.returncode == 0, done.stderr
    fused, adapted = done.stdout.split("\n---\n")[1:]
    assert "#" in fused
    assert fused == adapted


def test_packing_again_is_asked_for_and_its_loss_is_told(run, tmp_path):
    out = str(tmp_path / "packed")
    done = CliRunner().invoke(export, [str(run), "--fused", "--quantize", "4", "--out", out])
    assert done.exit_code == 0, done.exception
    assert "(4 bits)" in done.output
    assert "warning: this model lost much of the learned update" in done.output
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4


def test_the_adapter_gets_a_base_models_name(run, tmp_path):
    done = localrl("export", run, "--out", tmp_path / "new", "--base-id", "Some/Model")
    assert done.returncode == 0, done.stderr
    assert "base     Some/Model" in done.stdout
    assert json.loads((tmp_path / "new" / NOTE).read_text())["base_model"] == "Some/Model"
    new, old = read_adapter(tmp_path / "new"), read_adapter(run / "adapter")
    assert new.weights.keys() == old.weights.keys()
    assert all((new.weights[name] == old.weights[name]).all() for name in old.weights)
    again = localrl("export", run)  # in its place, and nothing is named
    assert again.returncode == 0, again.stderr
    assert "pass the unquantised model with --base-id" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--dtype", "float16"], "--dtype needs --fused"),
        (["{run}", "--quantize", "4"], "--quantize needs --fused"),
        (["{run}/adapter"], "Pass its model with --model"),
        (["{run}/adapter", "--model", "{model}"], "Name a new folder with --out"),
        (["{run}", "--out", "{run}"], "exists and is not empty"),
        (["{run}", "--base-id", "/a/path"], "must be a Hub id"),
        (["{tmp}"], "There is nothing to export in"),
    ],
)
def test_bad_input_is_one_clear_error(run, tmp_path, arguments, message):
    places = {"run": run, "model": embedded_model_path(), "tmp": tmp_path}
    done = CliRunner().invoke(export, [argument.format(**places) for argument in arguments])
    assert message in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 2
