"""Tables of every kind hold the same examples, and give the same run."""

from __future__ import annotations

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tables

from localrl import RunConfig, train
from localrl.errors import ConfigError, DataError
from localrl.tasks.files import load_file_task
from localrl.tasks.rows import read_examples
from localrl.tasks.splits import Split, choose_split
from localrl.tasks.tables import read_rows

ROWS = [{"question": f'sum {i}, "{i}"\n1', "final": str(i + 1), "level": "é"} for i in range(40)]
COLUMNS = ("prompt=question", "answer=final")
PLAIN = [{"prompt": f"sum {i} 1", "answer": str(i + 1)} for i in range(12)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    file = tables.jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    return load_file_task(file, (), columns=COLUMNS)


@pytest.mark.parametrize("name", tables.KINDS)
def test_every_kind_holds_the_same_examples(tmp_path, expected, name):
    path = tables.KINDS[name](tmp_path / name, ROWS)
    task = load_file_task(path, (), columns=COLUMNS)
    assert task.training == expected.training
    assert task.held_out == expected.held_out
    assert task.training[0].columns["level"] == "é"


def run(model, file, out):
    settings = {
        "model.path": str(model),
        "task.name": str(file),
        "task.rewards": ["accuracy"],
        "rollout.prompts_per_step": 3,
        "rollout.max_completion_tokens": 4,
        "run.steps": 1,
        "run.out": str(out),
    }
    folder = train(RunConfig.create(settings)).folder
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    weights = (folder / "adapter" / "adapters.safetensors").read_bytes()
    evaluated = json.loads((folder / "eval.json").read_text())
    return rollouts, evaluated["base"], evaluated["adapter"], weights


def in_the_cache(home, rows):
    """A data set in the Hub's cache under `home`, as its client lays it out."""
    folder = home / "datasets--acme--rows"
    table = folder / "snapshots" / ("0" * 40) / "data" / "train-00000-of-00001.parquet"
    table.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    tables.parquet(table, rows)
    return "acme/rows"


@pytest.mark.exact
def test_every_kind_gives_the_same_run(tiny_folder, tmp_path, monkeypatch):
    wanted = run(tiny_folder, tables.jsonl(tmp_path / "rows.jsonl", PLAIN), tmp_path / "first")
    for name in ("rows.csv", "rows.json", "rows.parquet", "rows"):
        path = tables.KINDS[name](tmp_path / name, PLAIN)
        assert run(tiny_folder, path, tmp_path / f"run of {name}") == wanted, name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name = in_the_cache(tmp_path / "hub", PLAIN)
    assert run(tiny_folder, name, tmp_path / "run of the cache") == wanted


def test_a_saved_dictionary_of_splits(tmp_path):
    for split, rows in (("train", ROWS[:9]), ("test", ROWS[9:12]), ("hard", ROWS[12:20])):
        tables.saved(tmp_path / split, rows)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "hard"]}')
    task = load_file_task(tmp_path, (), columns=COLUMNS)
    assert (task.train_size, len(task.held_out)) == (9, 3)
    hard = load_file_task(f"{tmp_path}:hard", (), columns=COLUMNS)
    assert hard.train_size + len(hard.held_out) == 8
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks data-00001-of-00002\.arrow"):
        load_file_task(tmp_path, ())


@pytest.mark.parametrize(
    ("names", "part", "split"),
    [
        (["rows.csv"], "", Split(("rows.csv",))),
        (["train.csv", "val.csv", "test.csv", "a.txt"], "", Split(("train.csv",), ("val.csv",))),
        (["train.jsonl", "train_old.jsonl"], "", Split(("train.jsonl",))),
        (["sums.csv", "test.csv"], "", Split(("sums.csv",), ("test.csv",))),
        (["test.csv"], "", Split(("test.csv",))),
        (["x_train.json", "x_test.json"], "", Split(("x_train.json",), ("x_test.json",))),
        (["data/train-1-of-2.json", "data/train-2-of-2.json", "dataset_infos.json"], "",
         Split(("data/train-1-of-2.json", "data/train-2-of-2.json"))),
        (["a/train.csv", "a/test.csv", "b/train.csv"], "a",
         Split(("a/train.csv",), ("a/test.csv",))),
        (["a/train.csv", "a/test.csv", "b/train.csv"], "a/test", Split(("a/test.csv",))),
        (["a/train.csv", "a/test.csv", "b/train.csv"], "test", Split(("a/test.csv",))),
        (["a.csv", "b.csv"], "b.csv", Split(("b.csv",))),
        (["train/x.csv", "train/y.csv", "dev/z.csv"], "",
         Split(("train/x.csv", "train/y.csv"), ("dev/z.csv",))),
    ],
)  # fmt: skip
def test_names_tell_what_is_trained_on(names, part, split):
    assert choose_split(names, part, "data") == split


@pytest.mark.parametrize(
    ("names", "part", "told"),
    [
        (["a.csv", "b.csv"], "", r"several tables to train on: a, b\..*data:a"),
        (["a/train.csv", "b/train.csv"], "", r"several tables to train on: a, b\."),
        (["a/train.csv", "b/train.csv"], "train", "several tables to train on: a, b"),
        (["train.csv", "train.json"], "", r"several tables to train on: train\.csv, train\.json"),
        (["train.csv"], "tran", "no table 'tran'. Did you mean 'train'"),
    ],
)
def test_what_names_do_not_tell_is_asked(names, part, told):
    with pytest.raises(ConfigError, match=told):
        choose_split(names, part, "data")


def test_values_that_json_lacks_become_text_and_bytes_are_refused(tmp_path):
    rows = {
        "prompt": ["a", "b"],
        "day": [datetime.date(2026, 2, 3)] * 2,
        "price": [decimal.Decimal("3.50")] * 2,
        "answer": [None, 2],
        "image": [{"bytes": b"\x89PNG", "path": None}] * 2,
    }
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table(rows), file)
    with pytest.raises(DataError, match=r"row 1: the column 'image' holds bytes.*--columns image="):
        load_file_task(file, ())
    task = load_file_task(file, (), columns=["image="])
    examples = sorted((*task.training, *task.held_out), key=lambda e: str(e.messages))
    assert examples[0].columns == {"day": "2026-02-03", "price": "3.50", "answer": None}
    assert [example.answer for example in examples] == [None, 2]


def test_null_ids_and_system_messages_are_none(tmp_path):
    rows = [{"prompt": "a", "id": None, "system": None}, {"prompt": "b", "id": "x", "system": "s"}]
    file = tables.parquet(tmp_path / "rows.parquet", rows)
    first, second = read_examples(read_rows(file), "all")
    assert (len(first.id), second.id) == (12, "x")
    assert [e.messages[0]["content"] for e in (first, second)] == ["all", "s"]


def test_columns_under_other_names(tmp_path):
    rows = [{"prompt": "old", "problem": "p", "solution": "long", "final": "4", "note": "n"}] * 2
    file = tables.jsonl(tmp_path / "rows.jsonl", rows)
    renames = {"prompt": "problem", "answer": "final", "note": ""}
    example, _ = read_examples(read_rows(file), None, renames)
    assert example.messages[0]["content"] == "p"
    assert example.answer == "4"
    assert example.columns == {"problem": "p", "answer": "4", "final": "4"}
    with pytest.raises(ConfigError, match=r"column 'finale', which the data lack\. Did you mean"):
        read_examples(read_rows(file), None, {"answer": "finale"})
    for texts, told in ((["prompt"], "Write NAME=COLUMN"), (["a=b", "a=c"], "names 'a' twice")):
        with pytest.raises(ConfigError, match=told):
            load_file_task(file, (), columns=texts)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,answer\na,1,2\n", r"line 2 has 3 fields, but the header has 2"),
        ("prompt,answer\na\n", r"line 2 has 1 fields"),
        ('prompt,answer\nb,2\n"a,1\n', r"line 3 is not CSV: .*Is a double quote missing"),
        ("prompt,prompt\na,1\n", "two columns named 'prompt'"),
        ("prompt,answer\n,1\n", "line 2: prompt is empty"),
        ("prompt,answer\n", "has 0 rows"),
        (" \n\n", "only blank lines"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_said(tmp_path, text, told):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=told):
        load_file_task(file, ())


def test_an_index_of_pandas_and_spaces_in_the_header_are_fine(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(",prompt, answer\r\n0,a,\r\n\r\n1,b,2\r\n")
    first, second = read_examples(read_rows(file))
    assert first.columns == {"column_1": "0", "answer": None}
    assert second.answer == "2"


def test_a_damaged_file_is_said(tmp_path):
    file = tables.parquet(tmp_path / "rows.parquet", ROWS)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"Cannot read .* after 0 rows"):
        load_file_task(file, ())
    file = tables.arrow(tmp_path / "rows.arrow", ROWS)
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"Cannot read .* Is the file complete"):
        load_file_task(file, ())


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    file = tables.parquet(tmp_path / "rows.parquet", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        ConfigError, match=r"needs pyarrow\. Install it: pip install 'localrl\[data\]'"
    ):
        load_file_task(file, ())
