"""What 16-bit rounding between sampler and update does to a step: nothing beyond its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from forests import scored
from steps import TEMPERATURE, plain_logprobs, plan, ragged_group, relative_difference, selection

from localrl.backend import mx, tree_flatten, tree_map
from localrl.engines.mlx.engine import MLXEngine
from localrl.learning.objectives import OBJECTIVES, make_objective
from localrl.learning.update import Updater
from localrl.policy.model import Policy
from localrl.settings import LearningConfig

BF16 = 0.05
"""Standard deviation in nats of what bfloat16 puts between sampler and update: 0.04 in the mean."""
LENGTHS = (24, 9, 31, 16)


def sampled_groups(policy, size, count=4):
    """Groups whose sampler computed the policy's log-probabilities up to normal noise."""
    draws = np.random.default_rng(0)
    groups = [scored(ragged_group(LENGTHS, 4 + 5 * n), [1, 0, 0, 1]) for n in range(count)]
    found = np.array(plain_logprobs(policy.model, groups))
    for group in groups:
        for node in group.group.nodes:
            own, found = np.split(found, [len(node.token_ids)])
            node.sampled_logprobs[:] = own + draws.normal(0, size, len(own))
    return groups


def batch_of(groups, objective):
    return selection(OBJECTIVES[objective], groups).batch


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_gspo_at_rate_0_leaves_no_completion_out_of_its_range(policy, updates):
    config = LearningConfig(objective="gspo", lr=0.0, updates_per_step=updates)
    groups = sampled_groups(policy, BF16)
    stats = Updater(policy, config, TEMPERATURE).update(batch_of(groups, "gspo"), plan())
    assert stats.updated
    assert stats.clipped_low == stats.clipped_high == 0
    assert stats.logprob_gap_mean == pytest.approx(0.04, rel=0.1)
    # The sampler's own ratios leave the range for nearly all of them.
    gaps = (np.array(plain_logprobs(policy.model, groups)), sampler(groups))
    means = [np.mean(g) for g in np.split(gaps[0] - gaps[1], np.cumsum(LENGTHS * 4)[:-1])]
    assert np.mean([-3e-4 < mean < 4e-4 for mean in means]) < 0.2


def sampler(groups):
    return np.concatenate([n.sampled_logprobs for g in groups for n in g.group.nodes])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_of_bfloat16_changes_the_gradient_by_its_size(policy, name):
    gradients = []
    for size in (0.0, BF16):
        config = LearningConfig(objective=name)
        batch = batch_of(sampled_groups(policy, size), name)
        gradients.append(Updater(policy, config, TEMPERATURE).gradient(batch, plan())[0])
    assert relative_difference(gradients[1], gradients[0]) < 2 * BF16


def test_a_token_that_the_sampler_hardly_expected_counts_twice_at_most(policy):
    groups = sampled_groups(policy, 0.0, count=1)
    groups[0].group.nodes[0].sampled_logprobs[3] -= 20
    config = LearningConfig(kl_coef=0.1, kl_estimator="k1")
    batch = selection(make_objective(config), groups).batch
    stats = Updater(policy, config, TEMPERATURE).gradient(batch, plan())[1].stats(1.0, 1.0)
    assert stats.truncated == pytest.approx(1 / sum(LENGTHS))
    assert stats.logprob_gap_max == pytest.approx(20, rel=1e-4)
    assert np.isfinite(stats.loss)
    assert abs(stats.loss) < 100


@pytest.fixture
def sixteen(tmp_path):
    """A policy whose base has bfloat16 floats; its adapters are float32."""
    policy = tiny.make_tiny_policy(tmp_path / "model")
    base = policy.model.parameters()
    adapters = policy.model.trainable_parameters()
    policy.model.update(tree_map(lambda array: array.astype(mx.bfloat16), base))
    policy.model.update(adapters)
    assert {a.dtype for _, a in tree_flatten(policy.model.trainable_parameters())} == {mx.float32}
    return policy


def test_the_policy_knows_its_floats(policy, sixteen):
    assert sixteen.sixteen_bit
    assert not policy.sixteen_bit


def counted(monkeypatch):
    calls, token_logprobs = [], MLXEngine.token_logprobs

    def counting(self, micro, **settings):
        calls.append(settings.get("gradient", False))
        return token_logprobs(self, micro, **settings)

    monkeypatch.setattr(MLXEngine, "token_logprobs", counting)
    return calls


def test_drift_starts_at_exactly_0_in_16_bits(sixteen, monkeypatch):
    """The pass after the update is compared with one of the same shapes before it."""
    batch = batch_of(sampled_groups(sixteen, BF16), "clipped")
    updater = Updater(sixteen, LearningConfig(lr=0.0), TEMPERATURE)
    updater.gradient.shared = True
    calls = counted(monkeypatch)
    assert updater.update(batch, plan(micro_rows=100)).drift == 0.0
    assert calls == [False, True, False]


def test_drift_of_a_moved_policy_in_16_bits_is_without_rounding(policy, monkeypatch):
    """Once an adapter has changed, two passes round independently: the pass after does so here."""
    batch = batch_of(sampled_groups(policy, BF16, count=8), "clipped")
    found = {}
    for sixteen_bit in (False, True):
        draws, calls = np.random.default_rng(1), []
        with monkeypatch.context() as patch:
            patch.setattr(Policy, "sixteen_bit", property(lambda self, known=sixteen_bit: known))
            updater = Updater(policy, LearningConfig(lr=0.0), TEMPERATURE)
            logprobs = updater.gradient.logprobs

            def rounding(micro, head_chunk, calls=calls, draws=draws, logprobs=logprobs):
                calls.append(1)
                exact = np.array(logprobs(micro, head_chunk))
                return mx.array(exact + draws.normal(0, BF16, len(exact)).astype(np.float32))

            updater.gradient.logprobs = rounding
            found[sixteen_bit] = updater.update(batch, plan(micro_rows=100)).drift
    assert found[False] == pytest.approx(0.04, rel=0.15)
    assert found[True] < 0.015


def test_drift_in_float32_needs_no_further_pass(policy, monkeypatch):
    batch = batch_of(sampled_groups(policy, BF16), "clipped")
    updater = Updater(policy, LearningConfig(lr=0.0), TEMPERATURE)
    updater.gradient.shared = True
    calls = counted(monkeypatch)
    assert updater.update(batch, plan(micro_rows=100)).drift < 1e-5
    assert calls == [True, False]


def test_stale_tokens_in_16_bits_are_weighed_as_fresh_ones_until_the_policy_moves(policy):
    """A group that comes back unchanged, beside the fresh one, with the sampler's rounding."""
    fresh = sampled_groups(policy, BF16, count=1)[0]
    now = np.split(np.array(plain_logprobs(policy.model, [fresh])), np.cumsum(LENGTHS)[:-1])
    pairs = list(zip(fresh.group.nodes, now, strict=True))
    known = [replace(n, old_logprobs=v, scored_logprobs=v) for n, v in pairs]
    unknown = [replace(n, old_logprobs=v) for n, v in pairs]
    found = []
    for nodes in (fresh.group.nodes, known, unknown):
        group = replace(fresh, group=replace(fresh.group, nodes=tuple(nodes)))
        updater = Updater(policy, LearningConfig(), TEMPERATURE)
        found.append(updater.gradient(batch_of([group], "clipped"), plan())[0])
    assert relative_difference(found[1], found[0]) == 0
    # From the sampler's record alone the roundings of a whole prefix would add up.
    assert relative_difference(found[2], found[0]) > 2 * BF16
