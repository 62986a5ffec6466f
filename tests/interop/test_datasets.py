"""What the real datasets library writes is read as it wrote it, without that library."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from localrl.config import RunConfig
from localrl.tasks.files import load_file_task
from localrl.training.given import hand_over

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "answer": str(i + 1),
        "level": i % 3,
    }
    for i in range(60)
]


@pytest.fixture
def expected(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load_file_task(file, ())


def test_every_way_to_write_a_data_set_holds_the_same_examples(tmp_path, expected):
    written = Dataset.from_list(ROWS)
    written.save_to_disk(tmp_path / "saved")
    written.save_to_disk(tmp_path / "shards", num_shards=3)
    written.to_parquet(tmp_path / "rows.parquet")
    written.to_json(tmp_path / "lines.jsonl")
    for name in ("saved", "shards", "rows.parquet", "lines.jsonl"):
        task = load_file_task(tmp_path / name, ())
        assert task.training == expected.training, name
        assert task.held_out == expected.held_out, name
    texts = written.remove_columns("level").map(lambda row: {"prompt": row["prompt"][0]["content"]})
    texts.to_csv(tmp_path / "rows.csv")
    texts.save_to_disk(tmp_path / "texts")
    one, other = (load_file_task(tmp_path / name, ()) for name in ("rows.csv", "texts"))
    assert (one.training, one.held_out) == (other.training, other.held_out)


def test_a_selection_is_read_as_it_was_saved_beside_the_caches_of_the_library(tmp_path):
    Dataset.from_list(ROWS).shuffle(seed=1).select(range(20)).save_to_disk(tmp_path / "some")
    loaded = load_from_disk(tmp_path / "some")
    loaded.map(lambda row: {"answer": row["answer"] + "0"})  # writes a cache into the folder
    task = load_file_task(tmp_path / "some", ())
    seen = {example.answer for example in (*task.training, *task.held_out)}
    assert seen == set(loaded["answer"])


def test_a_dictionary_of_splits(tmp_path):
    splits = {"train": ROWS[:30], "test": ROWS[30:40], "hard": ROWS[40:]}
    DatasetDict({n: Dataset.from_list(rows) for n, rows in splits.items()}).save_to_disk(tmp_path)
    task = load_file_task(tmp_path, ())
    assert (task.train_size, len(task.held_out)) == (30, 10)
    hard = load_file_task(f"{tmp_path}:hard", ())
    assert hard.train_size + len(hard.held_out) == 20


def test_a_data_set_is_handed_over_from_python():
    assert hand_over(RunConfig(), Dataset.from_list(ROWS), None)[1].rows == ROWS
