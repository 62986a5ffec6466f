"""Imports go one way, and the command line stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from waiting import DEADLINE_S

PACKAGE = Path(__file__).parent.parent / "localrl"

FLOORS = (
    {"records", "errors", "backend", "settings"},
    {"embedded", "processes", "utils"},
    {"config", "gguf", "rewards"},
    {"distributed", "memory", "policy", "runs"},
    {"engines", "learning", "report", "rollouts", "tasks"},
    {"evaluate", "export", "serving"},
    {"agents"},
    {"training"},
    {"display"},
    {"diagnostics", "train"},
    {"cli"},
    {"__main__"},
)
"""Rooms by floor, the lowest first. A module imports from lower floors, or from its own room."""
LEVELS = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def imported(path: Path) -> set[str]:
    """Names of modules imported anywhere in the file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "localrl":
            names |= {f"localrl.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here == "__init__":
        return
    for name in imported(path):
        there = room(name) if name.startswith("localrl.") else None
        if there is None or there == here:
            continue
        assert LEVELS[there] < LEVELS[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_mlx_comes_through_the_backend_alone(path):
    if path.name != "backend.py":
        assert not {name for name in imported(path) if name.split(".")[0] == "mlx"}


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    return result.stdout


def test_help_loads_nothing_heavy():
    loaded = run_python(
        "import sys, contextlib\n"
        "from localrl.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['train', '--help'])\n"
        "print('LOADED', *sys.modules)"
    ).split("LOADED")[1]
    heavy = {"mlx", "mlx.core", "mlx_lm", "transformers", "huggingface_hub", "numpy"}
    assert not heavy & set(loaded.split())


def test_the_public_names_are_there_in_any_order():
    run_python(
        "import localrl.train\n"
        "from localrl import train, RunConfig\n"
        "import localrl\n"
        "assert callable(train) and localrl.train is train\n"
        "assert set(localrl.__all__) == set(localrl._HOMES)\n"
        "assert all(getattr(localrl, name) is not None for name in localrl.__all__)\n"
    )


def test_dir_shows_the_public_names_alone():
    run_python(
        "import localrl\n"
        "shown = {name for name in dir(localrl) if not name.startswith('__')}\n"
        "assert shown == set(localrl.__all__), shown\n"
    )


def test_every_folder_of_modules_is_installed():
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(listed["packages"])
