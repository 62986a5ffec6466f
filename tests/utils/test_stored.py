"""Values by key in a JSON file."""

from __future__ import annotations

import json

from localrl.utils.stored import recall, remember


def test_values_stay_beside_each_other(tmp_path):
    file = tmp_path / "new" / "values.json"
    assert recall(file, "a") is None
    assert remember(file, "a", {"x": 1}) is None
    assert remember(file, "b", {"x": 2}) is None
    assert remember(file, "a", {"x": 3}) is None
    assert (recall(file, "a"), recall(file, "b")) == ({"x": 3}, {"x": 2})
    assert [path.name for path in file.parent.iterdir()] == ["values.json"]


def test_what_cannot_be_read_is_as_if_nothing_were_stored(tmp_path):
    file = tmp_path / "values.json"
    for text in ("", "[]", "{", '{"a": 3}', "\udcff"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        assert recall(file, "a") is None
    assert remember(file, "a", {"x": 1}) is None
    assert json.loads(file.read_text()) == {"a": {"x": 1}}


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    problem = remember(tmp_path / "file" / "values.json", "a", {})
    assert problem is not None
    assert "values.json cannot be written" in problem
