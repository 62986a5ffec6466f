from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from forests import forest, scored

from localrl.learning.credit import Credit, assign_credit, with_expected_reward
from localrl.records import ScoredGroup

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from estimators import ARMS, UNBIASED, Measured, measure
from forest_credit import forest_credit
from fork_task import SUCCESS, Forests, ForkTask, make_task, sample_forests

TASK = make_task(0)
ODDS = [(0.0, 0.0), (1.0, 0.0), (4.0, 0.3)]
"""kappa and prior."""


@cache
def measured(name: str) -> Measured:
    seed = list(ARMS).index(name)
    return measure(TASK, ARMS[name], blocks=20, block_size=500, seed=seed)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators(name):
    scale, bias = measured(name).deviations
    assert abs(scale) < 3
    assert bias < 3


@pytest.mark.parametrize("name", ["uniform", "treepo", "treerl", "surprisal", "surprisal-treerl"])
def test_the_known_bias_of_direction_is_seen(name):
    assert measured(name).deviations[1] > 3


@pytest.mark.parametrize(("name", "scale"), [("own", 0.5), ("treepo", 0.75), ("treerl", 1.65)])
def test_the_known_error_of_scale_is_seen(name, scale):
    assert measured(name).scale == pytest.approx(scale, abs=0.05)


@pytest.mark.parametrize("name", ["tree", "wide"])
def test_trees_cost_at_most_065_of_flat(name):
    assert measured(name).cost < 0.65 * measured("flat-8").cost


def test_sibling_baselines_alone_cost_more_than_flat():
    assert measured("siblings").cost > 1.1 * measured("flat-8").cost


def test_the_exact_gradient_is_that_of_the_expected_reward():
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(TASK.probs.shape)

    def value(step: float) -> float:
        weights = TASK.probs * np.exp(step * direction)
        return ForkTask(weights / weights.sum(axis=-1, keepdims=True), TASK.next_state).value

    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    assert slope == pytest.approx((TASK.gradient * direction).sum(), rel=1e-5)


def test_rewards_have_the_expected_mean():
    forests = sample_forests(TASK, ARMS["flat-8"].plan, 4000, np.random.default_rng(0))
    assert np.nanmean(forests.reward) == pytest.approx(TASK.value, abs=0.01)
    assert SUCCESS[0] > TASK.value


def random_forest(rng: np.random.Generator) -> ScoredGroup:
    """Uneven, of random arity, with survivors of pruning, lone roots and missing rewards."""
    roots = int(rng.integers(1, 4))
    parents, weights = [-1] * roots, [1.0] * roots
    for node in range(12):
        if node < len(parents) and rng.random() < 0.5:
            children = int(rng.integers(1, 5))
            weight = 1 / children if children > 1 else 1 / rng.uniform(0.2, 1)
            parents += [node] * children
            weights += [weight] * children
    leaves = [n for n in range(len(parents)) if n not in parents]
    rewards = [None if rng.random() < 0.2 else float(rng.normal()) for _ in leaves]
    planned = roots + int(rng.integers(0, 2))
    group = forest(parents, leaves, planned, tokens=1, cond_weights=weights)
    return scored(group, rewards)


def as_arrays(groups: list[ScoredGroup]) -> Forests:
    """One row per group, filled up with nodes that do not exist."""
    size = max(len(group.group.nodes) for group in groups)
    parent = np.full((len(groups), size), -1)
    weight, reward = np.zeros(parent.shape), np.full(parent.shape, np.nan)
    for i, group in enumerate(groups):
        for n, node in enumerate(group.group.nodes):
            parent[i, n], weight[i, n] = node.parent, node.cond_weight
        for leaf, value in zip(group.group.leaves, group.rewards, strict=True):
            reward[i, leaf.node] = np.nan if value is None else value
    nothing = np.zeros((0, len(groups), 0), int)
    return Forests(parent, weight, reward, groups[0].group.planned_roots, *[nothing] * 3)


def as_group(forests: Forests, i: int) -> ScoredGroup:
    exists = forests.cond_weight[i] > 0
    reward = forests.reward[i, exists]
    leaves = np.flatnonzero(~np.isnan(reward))
    group = forest(
        forests.parent[i, exists].tolist(),
        leaves.tolist(),
        forests.planned_roots,
        tokens=1,
        cond_weights=forests.cond_weight[i, exists].tolist(),
    )
    return scored(group, reward[leaves].tolist())


def assert_same(credit: Credit, advantages: np.ndarray, weights: np.ndarray) -> None:
    size = len(credit.weights)
    expected = [np.nan if a is None else a for a in credit.advantages]
    np.testing.assert_allclose(advantages[:size], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights[:size], credit.weights, rtol=1e-9)
    assert not weights[size:].any()


@pytest.mark.parametrize(("kappa", "prior"), ODDS)
def test_the_benchmark_measures_the_shipped_credit_on_random_forests(kappa, prior):
    rng = np.random.default_rng(0)
    for _ in range(200):
        group = random_forest(rng)
        advantages, weights = forest_credit(as_arrays([group]), kappa=kappa, prior=prior)
        group = replace(group, group=with_expected_reward(group.group, prior))
        assert_same(assign_credit(group, kappa=kappa), advantages[0], weights[0])


@pytest.mark.parametrize(("kappa", "prior"), ODDS)
@pytest.mark.parametrize("name", ["flat-8", "flat-1", "wide", "doubtful", "marks"])
def test_the_benchmark_measures_the_shipped_credit_on_its_own_forests(name, kappa, prior):
    forests = sample_forests(TASK, ARMS[name].plan, 50, np.random.default_rng(1))
    advantages, weights = forest_credit(forests, kappa=kappa, prior=prior)
    for i in range(50):
        group = as_group(forests, i)
        group = replace(group, group=with_expected_reward(group.group, prior))
        credit = assign_credit(group, kappa=kappa)
        assert_same(credit, advantages[i], weights[i])
