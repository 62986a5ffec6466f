"""Mistakes that a new user makes with data and rewards: the first answer is the right one."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tables
import within

from localrl.runs.logs import read_jsonl

ROWS = [{"prompt": f"sum {i} 1", "answer": str(i + 1)} for i in range(12)]
SMALL = (
    *("--no-supervise", "--steps", "4", "--set", "rollout.max_completion_tokens=4"),
    *("--set", "task.eval_prompts=1"),
)
REWARDS = """
def score(completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]

def nothing(completions, **kwargs):
    return [None] * len(completions)

def strict(completions, answer, **kwargs):
    return [float(c == a and a != "4") for c, a in zip(completions, answer)]

def tagged(completions, answer, **kwargs):
    return [float(c == f"<answer>{a}</answer>") for c, a in zip(completions, answer)]

def one_number(completions, **kwargs):
    return 1.0

def typo(completions, **kwargs):
    return [len(complétion) for c in completions]

def wants(completions, lowest):
    return [0.0] * len(completions)
"""


@pytest.fixture
def localrl(tmp_path, capfd):
    """The command in a folder with good rows, rewards, and the files of one mistake."""
    (tmp_path / "my.py").write_text(REWARDS, encoding="utf-8")
    tables.jsonl(tmp_path / "problems.jsonl", ROWS)

    def call(*words):
        return within.localrl(capfd, *words, cwd=tmp_path)

    return call


def data(name: str, content: bytes | str) -> Callable[[Path], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def rows(name: str, *changed: dict[str, str]) -> Callable[[Path], object]:
    return data(name, "\n".join(map(json.dumps, changed)))


def folder(name: str, file: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / name).mkdir()
        (place / name / file).write_text("{}")

    return make


def run_folder(place: Path) -> None:
    folder("old", "run.json")(place)
    (place / "old" / "metrics.jsonl").write_text("")


def nothing(place: Path) -> None: ...


ONE = json.dumps(ROWS[0])
TASKS: dict[str, tuple[Callable[[Path], object], str, int, str]] = {
    "a misspelt file": (nothing, "problem.jsonl", 2, "Did you mean problems.jsonl?"),
    "a missing CSV": (nothing, "data.csv", 2, "There is no file data.csv."),
    "a missing folder": (nothing, "data/sums", 2, "`localrl pull --data data/sums`"),
    "a data set of the Hub": (nothing, "openai/gsm8k", 2, "`localrl pull --data openai/gsm8k`"),
    "a part of one": (nothing, "openai/gsm8k:main", 2, "pull --data openai/gsm8k:main`"),
    "a data set's bare name": (nothing, "gsm8k", 2, "Your own data are a file (data.jsonl"),
    "an empty file": (data("a.jsonl", ""), "a.jsonl", 4, "a.jsonl is empty"),
    "a header alone": (data("a.csv", "prompt,answer\n"), "a.csv", 4, "a.csv has 0 rows"),
    "no header": (data("a.csv", "1+1,2\n1+2,3\n"), "a.csv", 4, "name it with --columns prompt="),
    "a spreadsheet": (data("a.xlsx", b"PK\x03\x04"), "a.xlsx", 4, "Save the sheet as CSV"),
    "one renamed": (data("a.csv", b"PK\x03\x04"), "a.csv", 4, "Save the sheet as CSV"),
    "an image": (data("a.png", b"\x89PNG"), "a.png", 4, "a.png is an image"),
    "a pickle": (data("a.pkl", pickle.dumps(1)), "a.pkl", 4, "localrl never does"),
    "one as JSONL": (data("a.jsonl", pickle.dumps(1)), "a.jsonl", 4, "a.jsonl is a pickle"),
    "gzip": (data("a.jsonl.gz", gzip.compress(b"{}")), "a.jsonl.gz", 4, "Unpack it first"),
    "plain text": (data("a.txt", "1+1=2"), "a.txt", 4, "a.txt is a document"),
    "a web page": (data("a.jsonl", "<!DOCTYPE html>"), "a.jsonl", 4, "Download the file itself"),
    "a pointer of Git LFS": (
        data("a.csv", "version https://git-lfs.github.com/spec/v1"), "a.csv", 4, "git lfs pull",
    ),
    "UTF-16": (data("a.csv", "prompt,answer".encode("utf-16")), "a.csv", 4, "Save it as UTF-8"),
    "one JSON object": (
        data("a.json", '{"data":\n [1]}'), "a.json", 4, "one JSON object with the keys 'data'",
    ),
    "another ending": (data("a.dat", ONE), "a.dat", 4, "rename it"),
    "a folder without data": (folder("mine", "notes.txt"), "mine", 4, "It holds notes.txt"),
    "a run": (run_folder, "old", 2, "localrl show old"),
    "a file of rewards": (nothing, "my.py", 4, "Define examples()"),
    "no such script": (nothing, "mine.py", 2, "Did you mean my.py?"),
    "other column names": (
        rows("a.jsonl", {"q": "1", "a": "1"}), "a.jsonl", 4, "its columns are 'q', 'a'",
    ),
    "an answer in the chat": (
        data("a.jsonl", json.dumps({"messages": [{"role": "assistant", "content": "2"}]})),
        "a.jsonl", 4, "put the right answer in `answer`",
    ),
    "one row": (data("a.jsonl", ONE), "a.jsonl", 4, "training and evaluation need one each"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TASKS)
def test_what_is_no_task_is_told(localrl, tmp_path, mistake):
    make, name, code, told = TASKS[mistake]
    make(tmp_path)
    done = localrl("train", "--task", name, "--reward", "accuracy", *SMALL)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert told in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["missing.csv", "a.xlsx"])
def test_what_is_wrong_with_data_is_told_before_the_missing_reward(localrl, tmp_path, name):
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    assert name in localrl("train", "--task", name, *SMALL).stderr
    assert "Name one with --reward accuracy" in localrl("train", "--task", "problems.jsonl").stderr


ANSWERLESS = [{"prompt": f"sum {i} 1", "result": str(i + 1)} for i in range(12)]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--reward", "score"], 2, "Name your own as path/to/file.py:function"),
        (["--reward", "acuracy"], 2, "did you mean 'accuracy'"),
        (["--reward", "my.py:scores"], 2, "my.py has no 'scores'"),
        (["--reward", "my.py:wants"], 2, "needs the column 'lowest'"),
        (["--reward", "my.py:one_number"], 4, "not a list of 1 numbers"),
        (["--reward", "my.py:typo"], 4, "name 'complétion' is not defined"),
        (["--reward", "accuracy", "--columns", "answer=result"], 2, "'result', which the data"),
        (["--reward", "accuracy", "--columns", "answer"], 2, "Write NAME=COLUMN"),
        (["--task", "steps", "--columns", "answer=x"], 2, "steps is a built-in task"),
    ],
)
def test_what_does_not_go_with_the_data_is_told(localrl, tmp_path, words, code, told):
    done = localrl("train", "--task", "problems.jsonl", *SMALL, *words)
    assert done.returncode == code, done.stderr
    assert told in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


def test_data_without_answers_do_not_train_for_nothing(localrl, tmp_path):
    tables.separated(tmp_path / "rows.csv", ANSWERLESS)
    words = ("train", "--task", "rows.csv", "--reward", "accuracy", *SMALL)
    done = localrl(*words)
    assert done.returncode == 2
    assert "no row of rows has one (answer, ground_truth, solution)" in done.stderr
    assert "Its other columns: result." in done.stderr
    assert "--columns answer=COLUMN" in done.stderr
    assert not (tmp_path / "runs").exists()
    done = localrl(*words, "--columns", "answer=result")
    assert done.returncode == 0, done.stderr
    assert "gold answers" not in done.stderr


def test_some_missing_answers_and_some_wrong_ones_are_told(localrl, tmp_path):
    tables.jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "sum 40 2"}, {"prompt": "sum 41 2"}])
    words = ("train", *SMALL, "--steps", "0", "--set", "task.eval_prompts=0")
    done = localrl(*words, "--task", "rows.jsonl", "--reward", "accuracy")
    assert "rows have no gold answer: accuracy_reward gives no reward for them" in done.stderr
    done = localrl(*words, "--task", "problems.jsonl", "--reward", "my.py:strict")
    assert "1 of 12 gold answers do not get 1 from strict ('4' of " in done.stderr
    done = localrl(*words, "--task", "problems.jsonl", "--reward", "my.py:tagged")
    assert "none of 12 gold answers gets 1 from tagged" in done.stderr
    done = localrl(*words, "--task", "problems.jsonl", "--reward", "my.py:score")
    assert (done.returncode, "gold answers" in done.stderr) == (0, False)


def test_one_problem_can_be_looked_at(localrl, tmp_path):
    tables.jsonl(tmp_path / "one.jsonl", ROWS[:1] * 3)
    done = localrl("tasks", "check", "one.jsonl")
    assert "3 rows with 1 different prompt" in done.stderr
    assert "prompts: 3 to train on, 0 held out" in done.stdout


def test_fewer_prompts_than_a_step_wants_are_enough(localrl, tmp_path):
    done = localrl("train", "--task", "problems.jsonl", "--reward", "accuracy", *SMALL)
    assert done.returncode == 0, done.stderr
    told = "the task has 8 training prompts, fewer than rollout.prompts_per_step=16"
    assert told in done.stderr
    run = tmp_path / "runs" / "problems-1"
    assert "prompts_per_step = 8" in (run / "config.toml").read_text()
    again = localrl("train", "--resume", "--out", run, "--steps", "5", "--no-supervise")
    assert again.returncode == 0, again.stderr


def test_a_run_without_any_reward_ends_after_three_steps(localrl, tmp_path):
    done = localrl("train", "--task", "problems.jsonl", "--reward", "my.py:nothing", *SMALL)
    assert done.returncode == 4, done.stderr
    assert "the reward 'nothing' is None, no reward, for all of 8 gold answers" in done.stderr
    assert "No completion of the last 3 steps got a reward: nothing gave None" in done.stderr
    run = tmp_path / "runs" / "problems-1"
    steps = [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "reward" in r]
    assert steps == [1, 2, 3]
    events = list(read_jsonl(run / "events.jsonl"))
    assert [e["step"] for e in events if e.get("name") == "no_reward"] == [1]
    assert events[-1]["kind"] == "failed"


def test_a_task_that_the_model_cannot_spell_is_told(localrl):
    done = localrl("tasks", "show", "countdown", "-n", 1)
    assert done.returncode == 0
    assert "unreadable: the embedded model has no token for" in done.stdout
    assert "--model MODEL" in done.stdout
    assert "unreadable" not in localrl("tasks", "show", "sums", "-n", 1).stdout
    assert "rows have none" not in localrl("tasks", "check", "problems.jsonl", "-n", 0).stdout
