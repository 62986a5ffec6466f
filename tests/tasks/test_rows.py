"""Rows of the user's data: what is kept of them, and what is said of bad ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.errors import DataError
from localrl.records import Group, Leaf, Node
from localrl.rewards.arguments import call_arguments
from localrl.tasks.files import load_file_task
from localrl.tasks.rows import read_examples, rename
from localrl.tasks.tables import read_rows

USER = {"role": "user", "content": "What is 6 * 7?"}
CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": [7]}}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "multiply", "tool_call_id": "c1", "content": "42"}
TOOL = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(tmp_path, row, system=None):
    (example,) = read_examples(read_rows(write(tmp_path / "rows.jsonl", [row])), system)
    return example


def completed(example, text, **more):
    """The arguments of a reward function for one completion with this text."""
    none = np.zeros(0, np.float32)
    node = Node(-1, np.zeros(0, np.int32), np.zeros(0, bool), none, none)
    return call_arguments([Group(example, (), (node,), (Leaf(0, "stop", text),), 1)], **more)


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
extras = st.dictionaries(
    st.sampled_from(["name", "reasoning_content", "tool_call_id", "weight"]),
    st.one_of(words, st.integers(), st.lists(words)),
)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), words, extras)), words)
def test_messages_are_kept_whole(turns, question):
    messages = [
        *({"role": role, "content": text, **more} for role, text, more in turns),
        {"role": "user", "content": question},
    ]
    (example,) = read_examples([("here", {"messages": messages})])
    assert [dict(message) for message in example.messages] == messages
    assert completed(example, "x")["prompts"] == [messages]


def test_calls_need_no_content_and_none_is_left_out(tmp_path):
    row = {"prompt": [USER, {**CALLED, "content": None, "audio": None}, RESULT]}
    assert list(one(tmp_path, row).messages) == [USER, CALLED, RESULT]
    thought = {"role": "assistant", "content": "", "reasoning_content": "6 * 7"}
    assert one(tmp_path, {"prompt": [USER, thought, USER]}).messages[1] == thought
    assert one(tmp_path, {"prompt": [USER, CALLED, {**RESULT, "content": ""}]})


@pytest.mark.parametrize(
    ("tools", "shown"),
    [([TOOL], (TOOL,)), (json.dumps([TOOL, TOOL]), (TOOL, TOOL)), (None, ()), ([], ()), ("", ())],
)
def test_tools_of_a_row_are_for_the_template(tmp_path, tools, shown):
    example = one(tmp_path, {"prompt": "p", "tools": tools})
    assert example.tools == shown
    assert example.columns["tools"] == tools


@pytest.mark.parametrize("tools", ["hammer", 3, ["hammer"], "[1]", {"a": 1}])
def test_tools_that_are_none_are_said(tmp_path, tools):
    with pytest.raises(DataError, match=r"line 1: tools is .*--columns tools="):
        one(tmp_path, {"prompt": "p", "tools": tools})
    row = rename({"prompt": "p", "tools": tools}, {"tools": ""})
    assert one(tmp_path, row).tools == ()


def test_parts_of_text_are_joined_and_others_are_refused(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "6 * 7?"}]
    example = one(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert list(example.messages) == [USER]
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    for content in ([image], [parts[0], image], ["text"], [{"type": "text"}]):
        with pytest.raises(DataError, match="line 1: a content has the part"):
            one(tmp_path, {"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "system": ""},
        {"prompt": "q", "system": None},
        {"prompt": "q", "system": " \n"},
        {"messages": [{"role": "system", "content": " "}, {"role": "user", "content": "q"}]},
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]},
    ],
)
def test_an_empty_system_message_is_none(tmp_path, row):
    assert [m["role"] for m in one(tmp_path, row).messages] == ["user"]
    assert one(tmp_path, row, "all").messages[0] == {"role": "system", "content": "all"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"problem": "p", "solution": "s"}, "p"),
        ({"instruction": "i", "output": "o"}, "i"),
        ({"instruction": "i", "input": "about this", "output": "o"}, "i\n\nabout this"),
        ({"instruction": "i", "input": "", "output": "o"}, "i"),
        ({"question": "q", "problem": "p", "input": "n"}, "q"),
        ({"prompt": "p", "instruction": "i", "input": "n"}, "p"),
        ({"prompt": "", "question": "q"}, "q"),
        ({"prompt": " ", "question": None, "problem": "p"}, "p"),
    ],
)
def test_prompts_have_five_names(tmp_path, row, text):
    example = one(tmp_path, row)
    assert example.messages[0]["content"] == text
    assert example.as_text
    assert example.columns == {k: v for k, v in row.items() if k not in ("prompt", "question")}


TURNS = [{"role": "system", "content": "be brief"}, USER, CALLED, RESULT, USER]


def test_messages_may_be_json_text(tmp_path):
    """Files whose values are all text have them so."""
    for example in (
        one(tmp_path, {"messages": json.dumps(TURNS), "answer": "42"}),
        one(tmp_path, {"prompt": "", "messages": "\n" + json.dumps(TURNS, indent=1)}),
    ):
        assert list(example.messages) == TURNS
        assert not example.as_text
        assert completed(example, "42")["completions"] == [[{"role": "assistant", "content": "42"}]]
    csv = tmp_path / "rows.csv"
    csv.write_text('messages,answer\n"[{""role"": ""user"", ""content"": ""hi""}]",42\n')
    (example,) = read_examples(read_rows(csv))
    assert list(example.messages) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("text", ["hello", repr(TURNS), json.dumps(USER), "[" * 9000, "42"])
def test_messages_that_are_other_text_are_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"line 1: messages is .*--columns prompt=messages"):
        one(tmp_path, {"messages": text})
    (example,) = read_examples([("here", {"messages": text})], None, {"prompt": "messages"})
    assert example.messages[0]["content"] == text
    assert one(tmp_path, {"prompt": "p", "messages": text}).as_text


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f'{{"prompt": "a"}}\n\n{{"prompt": "{LONG}", "answer": {LONG}}}', "line 3"),
        (f'{{"prompt": "a", "answer": [-{LONG}]}}', "line 1"),
        (f'[{{"prompt": "{LONG}"}} , {{"prompt": "a"}},\n {{"answer": {LONG}}}]', "row 3"),
        (f"[{LONG}]", "row 1"),
    ],
    ids=str.split("lines deep array bare"),
)
def test_an_integer_that_python_does_not_read_is_found(tmp_path, text, place):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError, match=rf"{place} holds an integer of more than 4300 digits"):
        read_examples(read_rows(file))


def test_naming_a_prompt_leaves_the_other_names_to_the_rewards():
    row = {"problem": "p", "instruction": "i", "question": "q", "answer": "a"}
    assert rename(row, {"prompt": "problem"}) == {
        "prompt": "p", "problem": "p", "instruction": "i", "answer": "a",
    }  # fmt: skip
    assert rename(row, {"instruction": "question"}) == {"instruction": "q", "answer": "a"}


@pytest.mark.parametrize("begun", ["<think>\n", "The answer is ", "  1."])
def test_a_turn_that_the_prompt_begins_is_part_of_the_completion(tmp_path, begun):
    messages = [USER, {"role": "assistant", "content": begun}]
    example = one(tmp_path, {"prompt": messages})
    assert example.begun == begun
    given = completed(example, "42")
    assert given["prompts"] == [[USER]]
    assert given["completions"] == [[{"role": "assistant", "content": begun + "42"}]]
    seen = completed(example, "42", render=lambda ids: f"<user>2<model>{begun.rstrip()}")
    assert seen["rendered_prompts"][0].rstrip() == "<user>2<model>"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "s"}, {"role": "assistant", "content": "x"}],
        [USER, {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
        [USER, CALLED],
        [USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}],
        [{"role": "system", "content": "s"}],
        [{"role": "system", "content": ""}],
    ],
)
def test_what_is_no_prompt_is_said(tmp_path, messages):
    with pytest.raises(DataError, match=r"line 1: (the last message is|there is no message of)"):
        one(tmp_path, {"messages": messages})


HALF = "\ud83d"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": f"a{HALF}"},
        {"prompt": "p", "answer": f"{HALF}b"},
        {"prompt": "p", "answer": {"deep": [HALF]}},
        {"prompt": "p", "system": HALF},
        {"prompt": "p", "id": HALF},
        {"question": "q", "solution": "\udc80"},
        {"prompt": "p", "tools": [{"name": HALF}]},
        {"messages": [USER, {**CALLED, "tool_calls": [{"name": HALF}]}, RESULT]},
    ],
)
def test_half_of_a_character_is_found_before_a_run(tmp_path, row):
    fine = {"prompt": "whole \ud83d\ude00", "answer": "\U0001f600"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(fine) + "\n" + json.dumps(row))
    assert "\\ud83d" in file.read_text()  # JSON's escapes, as Python writes them
    with pytest.raises(DataError, match=r"rows.jsonl, line 2 holds half of a character"):
        read_examples(read_rows(file))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["fine", "", None, [], HALF]), min_size=1, max_size=30))
def test_all_bad_rows_are_counted_and_the_first_is_explained(prompts):
    rows = [(f"d, line {n}", {"prompt": prompt}) for n, prompt in enumerate(prompts, start=1)]
    bad = [place for place, row in rows if row["prompt"] != "fine"]
    if not bad:
        assert len(read_examples(rows)) == len(rows)
        return
    with pytest.raises(DataError) as caught:
        read_examples(rows)
    told = str(caught.value)
    assert told.startswith(bad[0])
    assert all(place in told for place in bad[1:6])
    if len(bad) > 1:
        assert f"{len(bad)} of {len(rows)} rows are bad" in told
    assert (f"and {len(bad) - 6} more" in told) == (len(bad) > 6)


columns = st.dictionaries(st.sampled_from("abcd"), st.integers(), max_size=4)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(columns, min_size=2, max_size=9))
def test_every_example_has_the_columns_of_all_rows(tmp_path_factory, given_columns):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"p{n}", **own} for n, own in enumerate(given_columns)]
    union = {name for own in given_columns for name in own}
    alone = load_file_task(write(folder / "all.jsonl", rows), ())
    write(folder / "train.jsonl", rows[:-1])
    write(folder / "test.jsonl", rows[-1:])
    (folder / "all.jsonl").unlink()
    for task in (alone, load_file_task(folder, ())):
        examples = [*task.training, *task.held_out]
        assert len(examples) == len(rows)
        for example in examples:
            own = rows[int(example.messages[0]["content"][1:])]
            assert example.columns == {name: own.get(name) for name in union}
