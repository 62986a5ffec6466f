"""The expected gradient of stages that benchmarks add, beside exact ones of a tiny policy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from enumerated import (
    PAIRS,
    SPACE,
    A,
    Block,
    Measured,
    estimate,
    exact_gradient,
    examples,
    fresh,
    make_files,
    opened,
    reused,
)

from localrl.records import Leaf, Node
from localrl.runs.metrics import sampled_tokens

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import deciding
import prefixes
from allocation import Allocation
from prefixes import Prefixes, Stored, Visit, WeightedPrefixes, with_prefixes
from rivals import instead

BLOCKS = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("enumerated"))


def check(measured: Measured) -> None:
    """Check scale and direction, which must be known well enough to tell 0.9 from 1."""
    assert 3 * measured.scale_se < 0.1
    assert abs(measured.scale - 1) < 3 * measured.scale_se
    assert measured.across < max(3 * measured.across_se, 0.02)  # a cosine above 0.99


def test_early_ends(files, tmp_path, monkeypatch):
    """The first s decides the reward, so a completion ends there."""
    found, leaves = [], []
    with opened(files, tmp_path / "run", PAIRS) as session:
        exact, _ = exact_gradient(session.policy.model)
        monkeypatch.setattr(deciding, "rule", lambda session: lambda text, example: "s" in text)
        session = deciding.ending_early(session)
        for block in fresh(session, BLOCKS, 30):
            found.append((estimate(session, block), block.factor))
            leaves += [leaf for one in block.scored for leaf in one.group.leaves]
    assert {leaf.text.endswith("s") for leaf in leaves if leaf.finish_reason == "decided"} == {True}
    assert not any("s" in leaf.text[:-1] for leaf in leaves)
    check(Measured.of(found, exact))


def test_allocation(files, tmp_path, monkeypatch):
    """Half of the prompts have one completion, and half have three."""
    monkeypatch.setattr(Allocation, "_signal", lambda self, some: 1.0 + 2 * (np.arange(36) % 2))
    found = []
    with opened(files, tmp_path / "run", PAIRS) as session:
        exact, _ = exact_gradient(session.policy.model)
        session.sampler = instead(Allocation, session.sampler)
        for block in fresh(session, BLOCKS, 36):
            found.append((estimate(session, block), block.factor))
            assert {len(one.rewards) for one in block.scored} == {1, 3}
    check(Measured.of(found, exact))


def test_weighted_prefixes(files, tmp_path, monkeypatch):
    """Successes are begun with more often, and count less."""
    monkeypatch.setattr(prefixes, "half_way", lambda p: 0.5)
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 1)
    found, weights = [], set()
    with opened(files, tmp_path / "run", PAIRS) as session:
        exact, _ = exact_gradient(session.policy.model)
        session = with_prefixes(session, WeightedPrefixes)
        for block in reused(session, BLOCKS, 44):
            found.append((estimate(session, block), block.factor))
            nodes = [node for one in block.scored for node in one.group.nodes]
            weights |= {node.cond_weight for node in nodes if node.old_logprobs is not None}
    assert min(weights) < 0.8
    assert max(weights) > 1.2
    check(Measured.of(found, exact))


def test_prefixes(files, tmp_path, monkeypatch):
    """One completion of a pair begins in a given state: the mean of two gradients."""
    monkeypatch.setattr(prefixes, "half_way", lambda p: 0.5)
    ids, nothing = np.array([SPACE, A, A, A], np.int32), np.zeros(4, np.float32)
    node = Node(-1, ids, np.ones(4, bool), nothing, nothing)
    stored = [Stored(node, Leaf(0, "length", ""), reward) for reward in (0.0, 1.0)]
    found, blocks = [], []
    with opened(files, tmp_path / "run", PAIRS) as session:
        both = [exact_gradient(session.policy.model, begun=begun)[0] for begun in ((), (SPACE, A))]
        session = with_prefixes(session, Prefixes)
        for block in begun_there(session, tuple(stored)):
            found.append((estimate(session, block), block.factor))
            blocks += block.scored
    check(Measured.of(found, np.mean(both, axis=0)))
    assert {len(one.group.nodes) for one in blocks} == {3}
    assert all(one.group.nodes[1].token_ids.tolist() == [SPACE, A] for one in blocks)
    [drawn] = {sampled_tokens(one) - len(one.group.nodes[0].token_ids) for one in blocks[:1]}
    assert drawn == len(blocks[0].group.nodes[2].token_ids)


def begun_there(session, stored):
    """Yield groups of prompts whose last visits gave these completions."""
    for step in range(1, BLOCKS + 1):
        seen = examples(step, 30)
        [prompt] = set(session.sampler.encode(seen))
        session.sampler.visits = {e.id: Visit(prompt, stored, 0.5, 4.0) for e in seen}
        yield Block(session.sampler.collect(step, seen, step), step, len(seen))
