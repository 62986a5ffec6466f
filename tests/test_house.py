"""The house stays readable: one name for one class, plain docstrings, no engine in other rooms."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "localrl"
FILES = sorted(PACKAGE.rglob("*.py"))
VAGUE = re.compile(r"(What|Of|Whether|How|Why|Where|Those)\b")


def docstrings(tree: ast.Module):
    """Docstrings of modules, classes, functions, and of the fields and constants before them."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_have_a_subject_or_a_verb(path):
    found = [text for text in docstrings(ast.parse(path.read_text())) if VAGUE.match(text)]
    assert not found


def test_no_two_classes_have_one_name():
    names = Counter(
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_few_files_stand_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("room", ["rollouts", "memory", "learning"])
def test_no_engine_leaks_into(room):
    for path in (PACKAGE / room).rglob("*.py"):
        text = path.read_text()
        assert "localrl.engines" not in text, path
        assert not re.search(r"isinstance\([^)]*np\.ndarray|attends_in_c|policy\.arrays", text), (
            path
        )
    if room == "rollouts":
        assert not any("import mx" in path.read_text() for path in (PACKAGE / room).glob("*.py"))
