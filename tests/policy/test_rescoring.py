"""Log-probabilities of all sampled tokens of groups against plain full forward passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from forests import flat_group, forest

from localrl.backend import mx
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.network import Network
from localrl.policy.packing import forest_batches, row_batches
from localrl.policy.scoring import group_logprobs
from localrl.records import Batch, BatchNode, Group

TEMPERATURE = 0.8
FOREST = {"qwen3": True, "gemma3_text": True, "lfm2": False}


def groups() -> list[Group]:
    """Flat, forked with a node too many, with foreign tokens, and behind a prompt of one token."""
    deep = forest([-1, -1, 0, 0, 3, 3, 1, 1], leaves=[2, 4, 5, 6, 7], planned_roots=2, tokens=5)
    pruned = forest([-1, -1, 0, 0], leaves=[1, 2], planned_roots=2)
    mixed = flat_group(2, sampled=(True, False, True, True))
    return [
        flat_group(3),
        replace(deep, prompt_ids=(1, *range(5, 20), 2)),
        mixed,
        replace(pruned, prompt_ids=(2,)),
    ]


def plain(policy, group: Group, node: int) -> np.ndarray:
    above = [group.nodes[n].token_ids for n in group.path(node)]
    tokens = np.concatenate([group.prompt_ids, *above])
    logits = policy.model(mx.array(tokens[None]))[0].astype(mx.float32) / TEMPERATURE
    table = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    here = group.nodes[node]
    places = np.arange(len(tokens) - len(here.token_ids), len(tokens))
    return np.where(here.sampled, table[places - 1, here.token_ids], 0.0)


def found(policy, groups, shared, micro_rows=3):
    return group_logprobs(
        policy,
        groups,
        shared=shared,
        micro_rows=micro_rows,
        head_chunk=4,
        temperature=TEMPERATURE,
    )


@pytest.mark.parametrize("name", list(FOREST))
def test_all_sampled_tokens_equal_a_full_forward(tmp_path, name):
    policy = tiny.make_tiny_policy(tmp_path / name, **tiny.FAMILIES[name])
    for shared in {False, FOREST[name]}:
        for group, nodes in zip(groups(), found(policy, groups(), shared), strict=True):
            assert len(nodes) == len(group.nodes)
            for n, values in enumerate(nodes):
                assert values.dtype == np.float32
                np.testing.assert_allclose(values, plain(policy, group, n), atol=1e-4)
                assert not values[~group.nodes[n].sampled].any()


@pytest.mark.parametrize("shared", [True, False])
def test_the_size_of_a_micro_batch_changes_nothing(policy, shared):
    whole = found(policy, groups(), shared, 100)
    for size in (1, 4):
        for one, other in zip(whole, found(policy, groups(), shared, size), strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_whole_logits_serve_families_whose_head_is_hidden(policy):
    blind = replace(policy, engine=MLXEngine(Network(policy.model)))
    for one, other in zip(
        found(policy, groups(), False), found(blind, groups(), False), strict=True
    ):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_to_score(policy, shared):
    assert found(policy, [], shared) == []
    context = flat_group(2, sampled=(False, False))
    ((first, second),) = found(policy, [context], shared)
    assert first.tolist() == second.tolist() == [0, 0]
    empty = replace(context, nodes=(), leaves=())
    assert found(policy, [empty], shared) == [[]]


def batch_node(parent, tokens, coefficients, finish):
    zeros = np.zeros(len(tokens), np.float32)
    return BatchNode(
        0, parent, np.array(tokens), np.array(coefficients, np.float32), zeros, finish, zeros
    )


def test_targets_know_their_node():
    nodes = (
        batch_node(-1, [4, 5], [1, 1], False),
        batch_node(-1, [6, 7, 8], [1, 0, 1], True),
        batch_node(0, [9], [0], True),
        batch_node(0, [10, 11], [1, 1], True),
    )
    batch = Batch(((2, 3),), nodes, 1.0)
    wanted = {0: [4, 5], 1: [6, 8], 3: [10, 11]}
    for pack in (forest_batches, row_batches):
        for size in (1, 100):
            tokens: dict[int, list[int]] = {}
            for micro in pack(batch, size):
                for n, token in zip(micro.nodes, micro.targets, strict=True):
                    tokens.setdefault(int(n), []).append(int(token))
            assert tokens == wanted
