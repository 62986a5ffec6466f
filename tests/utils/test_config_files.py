"""A configuration's own files are found from any working directory."""

from __future__ import annotations

import pytest

from localrl.config import RunConfig

WRITTEN = """
[model]
path = "smollm2-135m"
[task]
name = "problems.jsonl"
rewards = ["rewards.py:score", "accuracy"]
tools = "tools.py:add"
"""


@pytest.fixture
def written(tmp_path):
    """An example's folder, and one beside it."""
    folder = tmp_path / "example"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("problems.jsonl", "rewards.py", "tools.py"):
        (folder / name).touch()
    (folder / "train.toml").write_text(WRITTEN)
    return folder


def test_files_beside_the_configuration_are_found(written, monkeypatch):
    monkeypatch.chdir(written.parent / "elsewhere")
    task = RunConfig.create(file="../example/train.toml").task
    assert task.name == "../example/problems.jsonl"
    assert task.rewards == ("../example/rewards.py:score", "accuracy")
    assert task.tools == ("../example/tools.py:add",)


def test_those_of_the_working_directory_come_first(written, monkeypatch):
    monkeypatch.chdir(written.parent / "elsewhere")
    (written.parent / "elsewhere" / "rewards.py").touch()
    task = RunConfig.create(file=written / "train.toml").task
    assert task.rewards == ("rewards.py:score", "accuracy")
    assert task.name == str(written / "problems.jsonl")


def test_a_judge_s_question_is_a_file_or_a_text(written, monkeypatch):
    monkeypatch.chdir(written.parent / "elsewhere")
    (written / "judge.txt").touch()
    for text, found in (
        ("judge.txt", str(written / "judge.txt")),
        ("Grade: {completion}", "Grade: {completion}"),
        ("x" * 5000 + "{completion}", "x" * 5000 + "{completion}"),
    ):
        (written / "train.toml").write_text(f'[task]\njudge_prompt = "{text}"\n')
        assert RunConfig.create(file=written / "train.toml").task.judge_prompt == found


def test_names_stay_names(written, monkeypatch):
    monkeypatch.chdir(written)
    config = RunConfig.create({"task.rewards": "other.py:score"}, file="train.toml")
    assert config.model.path == "smollm2-135m"
    assert config.task.rewards == ("other.py:score",)
    assert config.task.name == "problems.jsonl"
