"""Run folders to look at: a real tree run of a tiny model that writes markup and escapes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent))

HOSTILE = (
    "</script>",
    "<img src=x onerror=alert(1)>",
    "\x1b[31m",
    "<!--",
    "&lt;",
    "\u202e",
    "\n",
    "é",
)
"""Tokens of the model, beside single characters: it is random, so that it writes all of them."""


@pytest.fixture(scope="session")
def tree_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of trees, evaluated before and after; tests must leave it as it is."""
    from localrl import RunConfig, train

    folder = tmp_path_factory.mktemp("report")
    model = tiny.make_folder(folder / "model", extra=HOSTILE)
    rewards = Path(__file__).parent.parent / "worker_functions.py"
    settings = {
        "model.path": str(model),
        "task.name": "sums",
        "task.rewards": f"{rewards}:short",
        "task.eval_prompts": 4,
        "rollout.strategy": "tree",
        "rollout.fork_rule": "entropy",
        "rollout.prompts_per_step": 8,
        "rollout.group_size": 6,
        "rollout.max_completion_tokens": 24,
        "rollout.max_prompt_tokens": 40,
        "run.steps": 2,
        "run.out": str(folder / "run"),
    }
    return train(RunConfig.create(settings)).folder


@pytest.fixture
def run_copy(tree_run: Path, tmp_path: Path) -> Path:
    """The same run in a folder of its own, to be damaged."""
    return shutil.copytree(tree_run, tmp_path / "run")
