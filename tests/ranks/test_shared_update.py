"""Ranks that share a batch update as one process does that has it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import together
from steps import ragged_group, selection

from localrl.config import LearningConfig
from localrl.learning.objectives import make_objective
from localrl.learning.sharing import share_of
from localrl.records import ScoredGroup

CHILD = str(together.TESTS / "ranks" / "update_child.py")
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


@pytest.mark.parametrize(("size", "prompts"), [(2, 5), (3, 1)])
def test_the_sum_of_shares_is_the_gradient_of_the_whole(tmp_path, size, prompts):
    together.run(tmp_path, size, [CHILD, str(tmp_path), str(prompts)])
    paths = os.pathsep.join([str(together.TESTS), str(together.TESTS.parent)])
    command = [sys.executable, CHILD, str(tmp_path), str(prompts)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": paths})
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


def batch_of(*lengths):
    groups = [
        ScoredGroup(group, tuple(float(i % 2) for i in range(len(group.leaves))), {})
        for group in map(ragged_group, lengths)
    ]
    return selection(make_objective(LearningConfig()), groups).batch


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_whole_prompts_and_together_the_batch(size):
    batch = batch_of([5, 9, 3, 12], [2, 2, 17], [8, 1], [4, 4, 4, 4], [11, 6])
    shares = [share_of(batch, rank, size) for rank in range(size)]
    assert sum(len(share.prompts) for share in shares) == len(batch.prompts)
    found = [
        (share.prompts[node.prompt], node.token_ids.tolist(), node.coefficients.tolist())
        for share in shares
        for node in share.nodes
    ]
    expected = [
        (batch.prompts[node.prompt], node.token_ids.tolist(), node.coefficients.tolist())
        for node in batch.nodes
    ]
    assert sorted(found) == sorted(expected)
    assert all(share.z == batch.z for share in shares)
    for share in shares:
        for n, node in enumerate(share.nodes):
            assert node.parent < n
            assert node.parent < 0 or share.nodes[node.parent].prompt == node.prompt


def test_shares_weigh_alike():
    batch = batch_of(*([n, n + 1] for n in range(1, 21)))
    loads = [
        sum(len(node.token_ids) for node in share_of(batch, rank, 2).nodes) for rank in range(2)
    ]
    assert abs(loads[0] - loads[1]) <= 2
