"""The distributions: everything that a build needs is in the source, and no workflow publishes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from waiting import DEADLINE_S

ROOT = Path(__file__).parents[1]
COPIED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Names of the files in a source distribution built from a copy, without the root folder."""
    place = tmp_path_factory.mktemp("source")
    for name in (*COPIED, "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, place)
    compiled = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("localrl", "models", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=compiled)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    [file] = (place / "dist").iterdir()
    with tarfile.open(file) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_source_distribution_is_complete(source):
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "localrl").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert package - source == set()
    for model in ("steps-0.8m", "turns-0.1m"):
        assert f"models/{model}/model.safetensors" in source
    assert {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md"} <= source


def test_no_tests_are_in_it(source):
    assert not [name for name in source if name.startswith("tests")]


def test_the_workflow_tries_what_it_builds_and_publishes_nothing():
    text = (ROOT / ".github/workflows/wheels.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert not re.search("secrets|pypi|twine|upload-release|id-token", text)
    for job in workflow["jobs"].values():
        runs = [step["run"] for step in job["steps"] if "run" in step]
        assert [run.split()[0] for run in runs] == ["pipx", ".ci/installed"]
    assert (ROOT / ".ci/installed").stat().st_mode & 0o111
