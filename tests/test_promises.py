"""Every test that docs/promises.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/promises.md").read_text())


def test_every_promise_names_one():
    rows = (ROOT / "docs/promises.md").read_text().splitlines()
    promises = [row for row in rows if row.startswith("| ") and "promise" not in row]
    assert len(promises) >= 9
    assert all("::" in row for row in promises)


def test_what_is_promised_bit_for_bit_is_marked_as_such():
    """On a GPU it is not promised, and `-m "not exact"` leaves it out."""
    rows = (ROOT / "docs/promises.md").read_text().splitlines()
    (row,) = (row for row in rows if "bit for bit" in row)
    assert "on the CPU" in row
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row):
        functions = ast.walk(ast.parse((ROOT / file).read_text()))
        (test,) = (f for f in functions if isinstance(f, ast.FunctionDef) and f.name == name)
        assert "pytest.mark.exact" in map(ast.unparse, test.decorator_list)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_it_is_there(file, name):
    functions = ast.walk(ast.parse((ROOT / file).read_text()))
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}
