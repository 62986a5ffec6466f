"""What ranks that share an update do, beside one process that has it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import together
from waiting import DEADLINE_S

CHILD = str(together.TESTS / "distributed" / "update_child.py")
EXACT = ("trained_tokens", "updated", "problem")
OTHER = {*EXACT, "drift", "saved_positions"}
"""What is equal in every bit, and what depends on who has which prompts."""


def read(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return dict(file), json.loads((folder / f"{name}.json").read_text())


def difference(found, expected, part):
    names = [name for name in expected if name.startswith(part)]
    assert names
    apart = np.concatenate([(found[name] - expected[name]).ravel() for name in names])
    whole = np.concatenate([expected[name].ravel() for name in names])
    return np.linalg.norm(apart) / np.linalg.norm(whole)


def compare_with_one(tmp_path, size, prompts):
    """So many ranks that share so many prompts, with one process that has them all."""
    together.run(tmp_path, size, [CHILD, str(tmp_path), str(prompts)])
    paths = os.pathsep.join([str(together.TESTS), str(together.TESTS.parent)])
    command = [sys.executable, CHILD, str(tmp_path), str(prompts)]
    subprocess.run(command, check=True, timeout=DEADLINE_S, env={**os.environ, "PYTHONPATH": paths})
    expected, stats = read(tmp_path, "alone")
    first, _ = read(tmp_path, "rank-0")
    for rank in range(size):
        found, told = read(tmp_path, f"rank-{rank}")
        assert difference(found, expected, "gradient/") < 1e-5
        assert difference(found, expected, "adapter/") < 1e-4  # Adam's first steps amplify
        for name in expected:
            assert (found[name] == first[name]).all()  # the same on every rank, in every bit
        for mine, whole in zip(told, stats, strict=True):
            assert {k: mine[k] for k in EXACT} == {k: whole[k] for k in EXACT}
            for name in set(whole) - OTHER:
                assert mine[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name
            assert mine["drift"] > 0
