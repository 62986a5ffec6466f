"""What is read of files that a run is still writing."""

from __future__ import annotations

import pytest

from localrl.report import growing
from localrl.report.growing import KEPT, GroupIndex

GROUP = '{"format": 1, "step": 1, "messages": [], "nodes": [], "leaves": [], '


@pytest.mark.parametrize("end", ["", ', "replayed": false', ', "replayed": true'])
def test_groups_are_counted_without_being_parsed(tmp_path, monkeypatch, end):
    """Also those of older logs, whose lines end with another value."""
    monkeypatch.setattr(growing, "group_of", lambda line: pytest.fail("it was parsed"))
    fates = ['"kept": true, "reason": null', '"kept": false, "reason": "no reward"']
    lines = [f"{GROUP}{fate}{end}}}\n" for fate in (*fates, fates[0])]
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    index = GroupIndex(tmp_path).read()
    assert index.reasons == {KEPT: 2, "no reward": 1}
    assert index.offsets == [0, len(lines[0]), len(lines[0]) + len(lines[1])]
