"""Rows and reward functions that are handed to `train` from Python."""

from __future__ import annotations

import datetime
import functools
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import within

from localrl import RunConfig, train
from localrl.errors import CheckpointError, ConfigError, DataError, RewardError
from localrl.rewards.accuracy import accuracy_reward
from localrl.rewards.json_answers import get_json_reward
from localrl.runs.logs import read_jsonl
from localrl.training.given import hand_over

ROWS = [{"prompt": f"sum {n} {n + 1}", "answer": f"{2 * n + 1}", "n": n} for n in range(12)]
SMALL = {
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 6,
    "run.steps": 2,
}


def config(tiny_folder, out, **changes):
    settings = {**SMALL, "model.path": str(tiny_folder), "run.out": str(out), **changes}
    return RunConfig.create(settings)


class Letters:
    """An object that no other process could get."""

    def __init__(self, letter):
        self.letter, self.seen = letter, []

    def __call__(self, completions, n, **kwargs):
        self.seen += n
        return [float(text.count(self.letter)) for text in completions]


def halved(completions, share=1.0):
    return [share * len(text) for text in completions]


def test_rows_and_functions_of_a_notebook_are_trained_on(tiny_folder, tmp_path):
    letters, half = Letters("a"), functools.partial(halved, share=0.5)
    nothing = lambda completions: [None] * len(completions)  # noqa: E731
    rewards = [letters, half, "think_format", nothing]
    settings = config(tiny_folder, tmp_path / "run")
    done = train(settings, data=iter(ROWS), rewards=rewards, progress=False)
    names = {"Letters", "halved", "think_format_reward", "lambda"}
    (line, *_) = [r for r in read_jsonl(done.folder / "metrics.jsonl") if "reward" in r]
    assert {
        key.split("/")[1] for key in line if key.endswith("/mean") and "rewards/" in key
    } == names
    assert set(letters.seen) <= set(range(12))
    assert len(letters.seen) > 8
    for group in read_jsonl(done.folder / "rollouts.jsonl"):
        for leaf in group["leaves"]:
            parts = leaf["parts"]
            assert parts["Letters"] == leaf["text"].count("a")
            assert parts["halved"] == len(leaf["text"]) / 2
            assert parts["lambda"] is None
    assert 1 <= done.base.n < 12
    written = RunConfig.create(file=done.folder / "config.toml").task
    assert written.name == "rows"
    assert written.rewards == ("python:Letters", "python:halved", "think_format", "python:lambda")


def test_the_pages_own_example_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    monkeypatch.chdir(tmp_path)
    example = page.partition("```python\n")[2].partition("```")[0]
    exec(example.replace('"run.steps": 5', '"run.steps": 1'), {})
    assert " -> " in capsys.readouterr().out
    task = RunConfig.create(file=tmp_path / "runs" / "notebook" / "config.toml").task
    assert task.rewards[0] == "python:ends_with_the_answer"


def test_such_a_run_is_resumed_by_who_has_the_objects(tiny_folder, tmp_path, capfd):
    """And ends as if it had not been interrupted."""

    def adapter(folder):
        return (folder / "adapter" / "adapters.safetensors").read_bytes()

    given = {"data": ROWS, "rewards": halved, "progress": False}
    whole = train(config(tiny_folder, tmp_path / "whole", **{"run.steps": 4}), **given).folder
    out = train(config(tiny_folder, tmp_path / "run"), **given).folder
    longer = RunConfig.of_run(out / "config.toml", {"run.out": str(out), "run.steps": 4})
    with pytest.raises(ConfigError, match=r"python:halved\) cannot be loaded: it was handed to tr"):
        train(longer, resume=True, data=ROWS, progress=False)
    with pytest.raises(ConfigError, match=r"rows handed to train\(\) in Python"):
        train(longer, resume=True, rewards=halved, progress=False)
    with pytest.raises(CheckpointError, match="The data of this run has changed"):
        train(longer, resume=True, data=ROWS[1:], rewards=halved, progress=False)
    words = ["train", "--resume", "--out", str(out), "--steps", "4", "--no-supervise"]
    refused = within.localrl(capfd, *words, cwd=tmp_path)
    assert (refused.returncode, "rows handed to train()" in refused.stderr) == (2, True)
    train(longer, resume=True, **given)
    assert adapter(out) == adapter(whole)


def test_rows_alone_and_functions_alone_are_fine(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="No reward is set, so the answers to these rows"):
        train(config(tiny_folder, tmp_path / "none"), data=ROWS, progress=False)
    settings = {"task.rewards": ["accuracy"], "task.eval_prompts": 0}
    one = train(config(tiny_folder, tmp_path / "one", **settings), data=ROWS[:1], progress=False)
    assert one.steps == 2
    settings = {"task.eval_prompts": 5}
    two = train(config(tiny_folder, tmp_path / "two", **settings), rewards=[halved], progress=False)
    assert two.base.n == 5


def test_the_embedded_model_takes_all_rows(tmp_path):
    """The number of prompts that suits its own task does not count."""
    settings = {
        "run.steps": 1,
        "run.out": str(tmp_path / "run"),
        "rollout.max_completion_tokens": 4,
    }
    plain = RunConfig.create(settings)
    assert plain.task.train_prompts
    done = train(plain, data=ROWS, rewards="accuracy", progress=False)
    assert RunConfig.create(file=done.folder / "config.toml").task.train_prompts == 0


def test_failures_are_no_rewards_and_too_many_end_the_run(tiny_folder, tmp_path):
    def broken(completions, answer):
        raise RuntimeError(f"no connection, {answer[0]}")

    with pytest.raises(RewardError, match=r"(?s)for 100%.*RuntimeError: no connect"):
        train(config(tiny_folder, tmp_path / "run"), data=ROWS, rewards=[broken], progress=False)


def test_localrls_own_functions_go_by_name():
    inner = get_json_reward(schema={"type": "object"})
    named, given = hand_over(RunConfig(), None, [accuracy_reward, inner, inner])
    assert named.task.rewards[0] == "localrl.rewards.accuracy:accuracy_reward"
    assert named.task.rewards[1:] == tuple(given.functions)
    assert len(given.functions) == 2  # with different names


def test_values_of_other_libraries_are_kept_as_plain_ones():
    row = {
        "prompt": np.str_("a"),
        "n": np.int64(3),
        "list": (1, np.float32(0.5)),
        7: Decimal("0.5"),
    }
    _, given = hand_over(RunConfig(), [row], None)
    assert given.rows == [{"prompt": "a", "n": 3, "list": [1, 0.5], "7": 0.5}]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("rows.jsonl", ConfigError, "must be a list of dictionaries"),
        ({"prompt": ["a", "b"]}, ConfigError, "must be a list of dictionaries"),
        (7, ConfigError, "data is 7"),
        (["a", "b"], DataError, "Row 1 of data is 'a'; each must be a dictionary"),
        ([{"prompt": "a"}, ("b", 1)], DataError, "Row 2 of data"),
        ([{"prompt": "a", "day": datetime.date(2020, 1, 1)}], DataError, "the column 'day' cannot"),
        ([{"prompt": "a"}, {"prompt": "b", "all": {1}}], DataError, "Row 2 .* column 'all' cannot"),
    ],
)
def test_data_of_another_kind_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        hand_over(RunConfig(), data, None)


@pytest.mark.parametrize("data", [[], [{"prompt": ""}], [{"answer": "1"}], [{"prompt": "a"}] * 3])
def test_rows_are_checked_as_those_of_a_file(tiny_folder, tmp_path, data):
    with pytest.raises(DataError, match=r"data, row 1|data has [03] rows"):
        train(config(tiny_folder, tmp_path / "run"), data=data, rewards=halved, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rewards", [[3], [None], [Letters], [["accuracy"]], [{"a": halved}]])
def test_rewards_of_another_kind_are_refused(rewards):
    with pytest.raises(ConfigError, match="each must be a function"):
        hand_over(RunConfig(), None, rewards)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"task.name": "mine.jsonl"}, {"data": ROWS}, "task.name is 'mine.jsonl', and data= is"),
        ({"task.rewards": ["a.py:f"]}, {"rewards": halved}, "task.rewards is .* and rewards= is"),
    ],
)
def test_nothing_is_named_twice(settings, given, message):
    with pytest.raises(ConfigError, match=message):
        train(RunConfig.create({"model.path": "m", **settings}), progress=False, **given)
