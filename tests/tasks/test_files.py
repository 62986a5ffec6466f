from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.errors import ConfigError, DataError
from localrl.tasks.files import OnePrompt, load_file_task, make_file_task, split
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
        ({"prompt": ""}, ["line 2", "prompt is empty"]),
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


@settings(derandomize=True, max_examples=40, deadline=None)
@given(prompts=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=20))
def test_rows_are_held_out_in_part_not_at_all_or_all(prompts):
    rows = [(f"row {n}", {"prompt": prompt, "answer": n}) for n, prompt in enumerate(prompts)]

    def sides(hold_out):
        task = make_file_task("t", "t.jsonl", (), rows, 0, system=None, hold_out=hold_out)
        return [sorted(e.answer for e in side) for side in (task.training, task.held_out)]

    numbers = list(range(len(prompts)))
    assert sides("none") == [numbers, []]
    assert sides("all") == [numbers, numbers]
    if len(set(prompts)) == 1:
        with pytest.raises(OnePrompt, match=r"has \d+ rows? with 1 .*set task.eval_prompts=0"):
            sides("some")
        return
    training, held_out = sides("some")
    assert training
    assert held_out
    assert sorted(training + held_out) == numbers
    assert not {prompts[n] for n in training} & {prompts[n] for n in held_out}


def test_a_held_out_table_is_left_out_or_taken_alone(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a"}, {"prompt": "b"})
    write(tmp_path / "test.jsonl", {"prompt": "b"}, {"prompt": "c"}, {"prompt": "d"})
    with pytest.raises(DataError, match=r"1 of 3 prompts in .* are also trained on"):
        load_file_task(tmp_path, ())
    for hold_out, expected in (("none", ("ab", "")), ("all", ("bcd", "bcd"))):
        task = load_file_task(tmp_path, (), hold_out=hold_out)
        sides = (task.training, task.held_out)
        assert (
            tuple("".join(sorted(e.messages[0]["content"] for e in s)) for s in sides) == expected
        )


def test_a_table_without_rows_is_named(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a"})
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(DataError, match=r"test\.json has no rows"):
        load_file_task(tmp_path, ())
    for hold_out in ("some", "none", "all"):
        with pytest.raises(DataError, match="has 0 rows"):
            load_file_task(tmp_path / "test.json", (), hold_out=hold_out)


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
