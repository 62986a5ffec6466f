"""Every example folder trains with the command in its README."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import tiny
import within

from localrl.embedded import embedded_model_path
from localrl.errors import ConfigError

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(f"{path.parent.name}/{path.name}" for path in EXAMPLES.glob("*/*.toml"))
NO_SANDBOX = "No working sandbox was found"
SMALL = (
    "task.eval_prompts=2",
    "rollout.prompts_per_step=2",
    "run.eval_every=0",
)


def model_missing(file: str) -> str | None:
    """Why the example's model cannot be found; None when it can."""
    if "turns-0.1m" in (EXAMPLES / file).read_text():
        try:
            embedded_model_path("turns-0.1m")
        except ConfigError as error:
            return str(error)
    return None


@pytest.mark.parametrize("file", FILES)
def test_an_example_trains_with_the_command_in_its_readme(file, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    if reason := model_missing(file):
        pytest.skip(reason)
    name, _, toml = file.partition("/")
    folder = tmp_path / "examples" / name
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    readme = (folder / "README.md").read_text()
    command = re.search(rf"^    localrl (train \S*{re.escape(toml)})$", readme, re.MULTILINE)
    assert command, "the README has no command of that form"
    goes_there = f"    cd examples/{name}\n" in readme
    changes = [*SMALL]
    if "smollm2-135m" in (folder / toml).read_text():  # tests/real trains the model itself
        sizes = {"characters": tiny.PRINTABLE, "vocab_size": 128}
        changes.append(f"model.path={tiny.make_folder(tmp_path / 'model', **sizes)}")
    settings = [part for setting in changes for part in ("--set", setting)]
    words = (*command[1].split(), "--steps", "1", "--no-supervise", *settings)
    done = within.localrl(capfd, *words, cwd=folder if goes_there else tmp_path)
    if name == "code_tests" and NO_SANDBOX in done.stderr:
        pytest.skip(NO_SANDBOX)
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stderr
    assert "warning" not in done.stderr
    assert "pass@1" in done.stdout


def test_smollm2_is_paid_for_facts_in_json_and_nothing_else():
    facts = runpy.run_path(str(EXAMPLES / "smollm2" / "rewards.py"))["facts"]
    gold = '{"name": "Ada Weber", "age": 37}'
    worth = {
        '{\n "age": 37, "name": "Ada Weber"}\n': 1.0,
        '{"name": "Ada Weber", "age": "37"}': 1 / 2,
        '{"name": "Ada Weber"}': 1 / 2,
        '{"name": "Ada Weber", "age": 37, "pet": null}': 2 / 3,
        f"```json\n{gold}\n```": 0.0,
        f"{gold} That is all.": 0.0,
        "[37]": 0.0,
        "": 0.0,
    }
    messages = [[{"role": "assistant", "content": text}] for text in worth]
    for completions, answer in ((messages, gold), (list(worth), json.loads(gold))):
        found = facts(completions=completions, answer=[answer] * len(worth))
        assert found == list(worth.values())


def test_gold_answers_that_are_json_objects_score_1(capfd):
    if reason := model_missing("json_calls/train.toml"):
        pytest.skip(reason)
    check = "tasks check calls.jsonl --reward json --model turns-0.1m"
    assert f"    localrl {check}\n" in (EXAMPLES / "json_calls" / "README.md").read_text()
    words = (*check.split(), "-n", "0")
    done = within.localrl(capfd, *words, cwd=EXAMPLES / "json_calls")
    assert "gold answers: 180 of 180 score 1" in done.stdout, done.stderr


def test_every_example_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == set(re.findall(r"^\| \[(\w+)\]\(\1\)", table, re.MULTILINE))
