"""`localrl tasks check` and `show` on a user's own file."""

from __future__ import annotations

import json

import pytest
import tables
import within
from click.testing import CliRunner

from localrl.cli.tasks import tasks


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"sum {i} 1", "answer": str(i + 1)} for i in range(20)]
    rows += [rows[0] | {"answer": "wrong on purpose"}]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def invoke(*words):
    done = CliRunner().invoke(tasks, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_check_says_what_is_there_and_what_gold_answers_score(data, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(completions, answer):\n"
        "    return [float(c == a and a.isdigit()) for c, a in zip(completions, answer)]\n"
    )
    output = invoke("check", data, "--reward", f"{tmp_path / 'mine.py'}:right", "-n", 1)
    assert "to train on" in output
    assert "repeated: 1 prompts occur more than once" in output
    assert "'wrong on purpose' gets {'right': 0.0}" in output
    assert "reward time" in output


def test_check_fails_if_no_gold_answer_scores(tmp_path, capfd):
    rows = [{"prompt": f"sum {i} 1", "answer": {"is": i + 1}, "result": i + 1} for i in range(4)]
    tables.jsonl(tmp_path / "rows.jsonl", rows)
    words = ("tasks", "check", "rows.jsonl", "-n", 0)
    done = within.localrl(capfd, *words, cwd=tmp_path)
    assert done.returncode == 4
    assert "gold answers: 0 of 3 score 1" in done.stdout
    assert "'accuracy_reward' gives none of 3 gold answers more than an empty" in done.stderr
    assert within.localrl(capfd, *words, "--columns", "answer=result", cwd=tmp_path).returncode == 0


def test_characters_that_the_model_cannot_read_are_named(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{i} €", "answer": "1"}) for i in range(3)))
    assert "no token for '€'" in invoke("check", file, "-n", 0)


def test_show_renders_own_data(data):
    assert "<|user|>sum" in invoke("show", data, "-n", 2)
