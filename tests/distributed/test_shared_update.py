"""Ranks that share a batch update as one process does that has it all."""

from __future__ import annotations

import pytest
from shared_updates import compare_with_one
from steps import ragged_group, selection

from localrl.distributed.shard import shard_batch
from localrl.learning.objectives import make_objective
from localrl.records import ScoredGroup
from localrl.settings import LearningConfig


def test_the_sum_of_shares_is_the_gradient_of_the_whole(tmp_path):
    compare_with_one(tmp_path, size=2, prompts=5)


def batch_of(*lengths):
    groups = [
        ScoredGroup(group, tuple(float(i % 2) for i in range(len(group.leaves))), {})
        for group in map(ragged_group, lengths)
    ]
    return selection(make_objective(LearningConfig()), groups).batch


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_whole_prompts_and_together_the_batch(size):
    batch = batch_of([5, 9, 3, 12], [2, 2, 17], [8, 1], [4, 4, 4, 4], [11, 6])
    shares = [shard_batch(batch, rank, size) for rank in range(size)]
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
        sum(len(node.token_ids) for node in shard_batch(batch, rank, 2).nodes) for rank in range(2)
    ]
    assert abs(loads[0] - loads[1]) <= 2
