from __future__ import annotations

import json
import random

import pytest

from localrl.errors import ConfigError, DataError
from localrl.tasks.files import load_file_task, split
from localrl.tasks.rows import read_examples
from localrl.tasks.tables import read_rows


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path, system=None):
    return read_examples(read_rows(path), system)


def test_a_byte_order_mark_blank_lines_and_separators_inside_strings_are_fine(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = ['{"prompt": "a\u2028b", "answer": 1}', "", "  ", '{"question": "c", "answer": null}']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    first, second = read(file)
    assert first.messages == ({"role": "user", "content": "a\u2028b"},)
    assert (first.answer, second.answer) == (1, None)


@pytest.mark.parametrize("column", ["answer", "ground_truth", "solution"])
def test_answers_have_three_names_and_reach_the_rewards_under_their_own_too(tmp_path, column):
    (example,) = read(write(tmp_path / "d.jsonl", {"prompt": "p", column: "42", "level": 3}))
    assert example.answer == "42"
    assert example.columns == {column: "42", "level": 3}


def test_the_gold_of_gsm8k_stands_behind_its_mark(tmp_path):
    text = "She has 2 + 3 = <<2+3=5>>5 apples.\n#### 1,205"
    (example,) = read(write(tmp_path / "d.jsonl", {"question": "How many?", "answer": text}))
    assert example.answer == "1,205"
    assert example.columns["answer"] == text


def test_system_messages_come_from_the_row_the_conversation_or_the_setting(tmp_path):
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    rows = [{"prompt": "a"}, {"prompt": "b", "system": "row"}, {"messages": chat}]
    examples = read(write(tmp_path / "d.jsonl", *rows), system="all")
    assert [e.messages[0]["content"] for e in examples] == ["all", "row", "own"]
    assert "system" not in examples[1].columns


def test_names_survive_reordering_and_equal_rows_get_different_ones(tmp_path):
    rows = [{"prompt": f"p{i % 4}", "answer": i % 4} for i in range(6)]
    names = [e.id for e in read(write(tmp_path / "a.jsonl", *rows))]
    other = [e.id for e in read(write(tmp_path / "b.jsonl", *rows[::-1]))]
    assert len(set(names)) == 6
    assert set(names) == set(other)
    assert names[4] == f"{names[0]}-2"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", ["line 2", "not JSON"]),
        ("[1]", ["line 2", "JSON object"]),
        ({"text": "x"}, ["line 2", "no prompt", "'text'"]),
        ({"prompt": ""}, ["line 2", "prompt", "text"]),
        ({"prompt": 3}, ["line 2", "list of chat messages"]),
        ({"prompt": []}, ["line 2"]),
        ({"prompt": [{"role": "user"}]}, ["line 2", "role", "content"]),
        ({"prompt": [{"role": "human", "content": "x"}]}, ["line 2", "'human'"]),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["line 2", "`answer`"]),
        ({"prompt": "x", "id": "one"}, ["line 2", "'one'", "line 1"]),
        ({"prompt": "x", "system": 4}, ["line 2", "system"]),
        ("[" * 100_000, ["line 2"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, words):
    file = write(tmp_path / "d.jsonl", {"prompt": "fine", "id": "one"}, row)
    with pytest.raises(DataError) as caught:
        read(file)
    for word in ["d.jsonl", *words]:
        assert word in str(caught.value)


def test_other_encodings_are_refused(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read(file)


def test_the_split_survives_reordering_and_keeps_equal_prompts_together(tmp_path):
    rows = [{"prompt": f"p{i // 2}", "answer": i} for i in range(400)]
    examples = read(write(tmp_path / "a.jsonl", *rows))
    random.Random(0).shuffle(rows)
    others = read(write(tmp_path / "b.jsonl", *rows))
    sides = [[{e.id for e in side} for side in split(each)] for each in (examples, others)]
    assert sides[0] == sides[1]
    training, held_out = split(examples)
    assert not {e.messages[0]["content"] for e in training} & {
        e.messages[0]["content"] for e in held_out
    }
    assert 20 < len(held_out) < 90


def test_two_rows_are_enough_and_one_is_not(tmp_path):
    two = write(tmp_path / "two.jsonl", {"prompt": "a"}, {"prompt": "b"})
    task = load_file_task(two, ())
    assert (task.train_size, len(task.evaluation(9))) == (1, 1)
    with pytest.raises(DataError, match="two"):
        load_file_task(write(tmp_path / "one.jsonl", {"prompt": "a"}), ())


def test_a_folder_with_a_held_out_file(tmp_path):
    write(tmp_path / "train.jsonl", *({"prompt": f"p{i}"} for i in range(5)))
    write(tmp_path / "valid.jsonl", {"prompt": "q0"}, {"prompt": "q1"})
    task = load_file_task(tmp_path, (), train_prompts=3)
    assert [task.train(i).messages[0]["content"] for i in range(3)] == ["p0", "p1", "p2"]
    assert {e.messages[0]["content"] for e in task.evaluation(10)} == {"q0", "q1"}
    with pytest.raises(ConfigError, match="train_prompts is 9"):
        load_file_task(tmp_path, (), train_prompts=9)
    write(tmp_path / "valid.jsonl", {"prompt": "p2"})
    with pytest.raises(DataError, match="also trained on"):
        load_file_task(tmp_path, ())


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        load_file_task(tmp_path / "none.jsonl", ())
    with pytest.raises(DataError, match=r"no table of problems.*It is empty"):
        load_file_task(tmp_path, ())
