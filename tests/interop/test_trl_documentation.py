"""Every reward function of a page of TRL's own documentation, word for word.

TRL_DOCS names the page, such as docs/source/grpo_trainer.md in a copy of TRL's repository: its text
is not ours to carry along. The shapes of its examples are in text_rewards.py and chat_rewards.py.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from pathlib import Path

import pytest
from test_trl_functions import CHAT, TEXT, both

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PAGE = os.environ.get("TRL_DOCS")
HELPERS = """
def check_math_solution(prompt, completion):
    return "4" in completion

def test_code_solution(prompt, completion):
    return "return" in completion
"""
"""What the page's example of several tasks leaves to the reader."""


def reward_files(page: str) -> list[tuple[str, list[str]]]:
    """The code blocks with reward functions: imports and functions as they stand, and the names."""
    found = []
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        try:
            body = ast.parse(block).body
        except SyntaxError:  # dialogues and fragments
            continue
        kept = [part for part in body if isinstance(part, FUNCTIONS) and _is_whole(part)]
        names = [f.name for f in kept if _arguments(f) & {"completions", "completion_ids"}]
        imports = [part for part in body if isinstance(part, (ast.Import, ast.ImportFrom))]
        plain = [ast.get_source_segment(block, part) or "" for part in (*imports, *kept)]
        text = "\n\n".join(part for part in plain if not re.search(r"\b(trl|datasets)\b", part))
        if names:
            found.append((HELPERS + text, names))
    return found


def _is_whole(function: ast.AST) -> bool:
    """Not one that the page only hints at."""
    return any(isinstance(part, ast.Return) for part in ast.walk(function))


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {argument.arg for argument in function.args.args}


@pytest.mark.skipif(PAGE is None, reason="TRL_DOCS names no page")
def test_the_functions_of_a_page(tmp_path: Path) -> None:
    files = reward_files(Path(str(PAGE)).read_text())
    assert files, f"{PAGE} holds no reward function"
    for i, (text, names) in enumerate(files):
        path = tmp_path / f"page_{i}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows = CHAT if '["content"]' in text else TEXT
        ours, _, _ = both(tmp_path / path.stem, rows, module, names)
        print(path.stem, [dict(group.parts) for group in ours])
