"""What is known of gold answers before a run: whether the rewards can read any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from waiting import DEADLINE_S

from localrl.diagnostics.inspect_task import TaskReport, inspect_task
from localrl.embedded import embedded_model_path
from localrl.errors import ConfigError
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.processes.worker import Worker
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.scoring import Scorer
from localrl.tasks.files import FileTask, make_file_task
from localrl.training.reward_checks import check_rewards

OWN = """
def tagged(completions, answer):
    return [float(c == f"<a>{a}</a>") for c, a in zip(completions, answer)]

def distance(completions, answer):
    return [-abs(float(c or "99") - float(a)) for c, a in zip(completions, answer)]

def half(completions, answer):
    return [0.5 * (c == a) for c, a in zip(completions, answer)]

def nothing(completions):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit_s=DEADLINE_S, memory_limit_bytes=None) as worker:
        yield worker


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(embedded_model_path())


def task_of(answers: Sequence[Any], reward: str, **columns: Sequence[Any]) -> FileTask:
    names = {"answer": answers, **columns}
    rows = [
        (f"line {i}", {"prompt": f"sum {i} 1", **{name: c[i] for name, c in names.items()}})
        for i in range(len(answers))
    ]
    return make_file_task("rows", "rows.jsonl", parse_rewards([reward]), rows, 0, system=None)


@pytest.fixture
def check(worker: Worker, tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)

    def inspect(answers: Sequence[Any], reward: str, **columns: Sequence[Any]) -> TaskReport:
        task = task_of(answers, reward.replace("own.py", f"{tmp_path}/own.py"), **columns)
        scorer = Scorer(task.rewards, worker, lambda line: None)
        return inspect_task(task, scorer, tokenizer, max_prompt_tokens=99, per_step=4, gold=True)

    return inspect


FOUR = ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("answers", "reward"),
    [
        (FOUR, "accuracy"),
        ([["1", "one"], ["2"], ["3"], ["4"]], "accuracy"),
        (["Paris", "", "Lyon", "Nice"], "accuracy"),
        ([[1], [2], [3], [4]], "json"),
        (FOUR, "final_answer"),
        ([1, 2, 3, 4], "final_answer"),
        (FOUR, "reasoning_accuracy"),
        (FOUR, "cosine_scaled(max_len=9)"),
        (["A", "(B)", "C", ["A", "B"]], "choice"),
        (FOUR, "think_format"),
        (FOUR, "own.py:distance"),
        (FOUR, "own.py:half"),
    ],
)
def test_gold_answers_that_score(check, answers: Sequence[Any], reward: str) -> None:
    assert check(answers, reward).learns_nothing == ""


@pytest.mark.parametrize(
    ("answers", "reward", "told"),
    [
        ([{"a": 1}] * 4, "accuracy", "gives none of 3 gold answers more than an empty completion"),
        (["x" * 2001] * 4, "accuracy", "(None for "),
        (["yes", "no", "yes", "no"], "choice", "'choice_reward' gives none of"),
        (["no JSON"] * 4, "json", "'json_reward' gives none of"),
        ([None, "", None, []], "accuracy", "no row has the gold answer that 'accuracy_reward'"),
        (FOUR, "own.py:tagged", "'tagged' gives none of"),
        (FOUR, "own.py:nothing", "'nothing' gives none of"),
        (["First add.\n\nThen halve."] * 4, "accuracy", "(0.0 for "),
    ],
)
def test_gold_answers_of_which_none_scores(
    check, answers: Sequence[Any], reward: str, told: str
) -> None:
    assert told in check(answers, reward).learns_nothing


def test_an_empty_answer_does_not_hide_the_solution(check) -> None:
    report = check(["", None, [], ""], "accuracy", solution=FOUR)
    assert (report.unanswered, report.wrong, report.learns_nothing) == (0, [], "")
    report = check(FOUR, "accuracy", solution=["", "in words", "#### 9", None])
    assert report.wrong == []


@pytest.mark.parametrize(
    ("answers", "reward"),
    [([{"a": 1}] * 4, "accuracy"), (["yes"] * 4, "choice"), (["no JSON"] * 4, "json")],
)
def test_a_run_is_refused_if_no_gold_answer_can_be_read(
    worker: Worker, tokenizer: Tokenizer, answers: Sequence[Any], reward: str
) -> None:
    task = task_of(answers, reward)
    scorer = Scorer(task.rewards, worker, lambda line: None)
    with pytest.raises(ConfigError, match="can read none of 3 gold answers of rows; the first is"):
        check_rewards(task, scorer, tokenizer, lambda line: None, gold=True)


def test_lists_of_accepted_answers_are_no_reason_to_warn(
    worker: Worker, tokenizer: Tokenizer
) -> None:
    task, warned = task_of([["1", "one"], ["2"], ["3"], ["4"]], "accuracy"), []
    scorer = Scorer(task.rewards, worker, warned.append)
    check_rewards(task, scorer, tokenizer, warned.append, gold=True)
    assert warned == []
