"""The update against the plainest computation of the same formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored
from steps import (
    LMAX,
    TEMPERATURE,
    first_pass,
    plain_logprobs,
    plan,
    relative_difference,
    selection,
)

from localrl.backend import mx, nn, tree_flatten, tree_map
from localrl.distributed.shard import shard_batch
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.network import Network
from localrl.errors import LocalRLError
from localrl.learning import update
from localrl.learning.credit import assign_credit, token_coefficients
from localrl.learning.objectives import OBJECTIVES, make_objective
from localrl.learning.update import Updater, global_norm
from localrl.records import Batch
from localrl.settings import LearningConfig


def groups():
    """Ragged groups with forks, foreign tokens and a completion without a reward."""
    return [
        scored(flat_group(4, sampled=[True] * 7), [1, 0, None, 1]),
        scored(flat_group(3, sampled=[True, True, False, False, True]), [0, 0, 1]),
        scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2, tokens=4), [0, 1, 0]),
        scored(flat_group(2), [1, 1]),
    ]


def make_batch(scored_groups) -> Batch:
    return selection(OBJECTIVES["clipped"], scored_groups).batch


def plain_gradient(policy, scored_groups, config, first=None):
    """The design's formula, row by row: every completion alone, full logits, autodiff.

    first: log-probability of every token in the step's first pass; None: this pass is the first.
    """
    objective = make_objective(config)

    def loss(model):
        total = mx.array(0.0)
        for group in scored_groups:
            coefficients = token_coefficients(group.group, assign_credit(group))
            counted = set()
            for leaf in group.group.leaves:
                path = group.group.path(leaf.node)
                nodes = [group.group.nodes[n] for n in path]
                tokens = list(group.group.prompt_ids)
                tokens += [int(t) for node in nodes for t in node.token_ids]
                logits = model(mx.array([tokens]))[0].astype(mx.float32) / TEMPERATURE
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                place = len(group.group.prompt_ids)
                for n, node in zip(path, nodes, strict=True):
                    for t in range(len(node.token_ids)):
                        if n not in counted:
                            new = logprobs[place - 1, int(node.token_ids[t])]
                            then = mx.stop_gradient(new) if first is None else mx.array(first)
                            correction = mx.exp(then - float(node.sampled_logprobs[t]))
                            ratio = mx.exp(new - then)
                            held = mx.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
                            c = mx.minimum(correction, 2) * float(coefficients[n][t])
                            total = total - mx.minimum(ratio * c, held * c)
                        place += 1
                    counted.add(n)
        return total / (len(scored_groups) * 40.0)

    return nn.value_and_grad(policy.model, lambda: loss(policy.model))()


# In a first pass every ratio is 1. In a later one a wide hold lets every token through; the narrow
# one cuts most of them off.
@pytest.mark.parametrize("first", [None, -2.0])
@pytest.mark.parametrize(
    "config", [LearningConfig(clip_low=1.0, clip_high=100.0), LearningConfig()]
)
@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_equals_the_plain_one(policy, config, shared, first):
    value, expected = plain_gradient(policy, groups(), config, first)
    batch = make_batch(groups())
    known = None
    if first is not None:
        sizes = [len(node.token_ids) for node in batch.nodes]
        known = first_pass(batch, [np.full(n, first, np.float32) for n in sizes])
    updater = Updater(policy, config, TEMPERATURE)
    updater.gradient.shared = shared
    gradient, total = updater.gradient(batch, plan(), known)
    assert relative_difference(gradient, expected) < 1e-5
    assert total.loss / batch.z == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("micro_rows", "head_chunk"), [(1, 16), (2, 5), (5, 1000), (100, 3)])
def test_any_micro_batch_size_gives_the_same_gradient(policy, micro_rows, head_chunk, shared):
    batch = make_batch(groups())
    updater = Updater(policy, LearningConfig(clip_low=1.0, clip_high=100.0), TEMPERATURE)
    updater.gradient.shared = shared
    whole, _ = updater.gradient(batch, plan(micro_rows=100, head_chunk=1000))
    parts, _ = updater.gradient(batch, plan(micro_rows, head_chunk))
    assert relative_difference(parts, whole) < 1e-5


def test_a_model_that_hides_its_states_gets_the_same_gradient(policy):
    batch = make_batch(groups())
    config = LearningConfig(clip_low=1.0, clip_high=100.0)
    split, _ = Updater(policy, config, TEMPERATURE).gradient(batch, plan())
    hidden = replace(policy, engine=MLXEngine(Network(policy.model)))
    whole, _ = Updater(hidden, config, TEMPERATURE).gradient(batch, plan())
    assert relative_difference(split, whole) < 1e-5


def test_foreign_tokens_are_context_but_change_no_coefficient(policy):
    plain = scored(flat_group(2, sampled=[True, True, True]), [1, 0])
    mixed = scored(flat_group(2, sampled=[True, False, True]), [1, 0])
    updater = Updater(policy, LearningConfig(clip_low=1.0, clip_high=100.0), TEMPERATURE)

    def gradient(group, token):
        group.group.nodes[0].token_ids[1] = token
        batch = make_batch([group])
        coefficients = [node.coefficients.tolist() for node in batch.nodes]
        return updater.gradient(batch, plan())[0], coefficients

    one, coefficients_one = gradient(mixed, 9)
    other, coefficients_other = gradient(mixed, 10)
    assert coefficients_one == coefficients_other == [[0.5, 0, 0.5], [-0.5, 0, -0.5]]
    # It is context: another foreign token makes the later tokens' log-probabilities others.
    assert relative_difference(one, other) > 1e-3
    # It is not trained: as a token of the model's own it would add to the gradient.
    own, _ = gradient(plain, 9)
    assert relative_difference(own, one) > 1e-3


@pytest.fixture
def own_policy(tmp_path):
    """A policy that the test may change."""
    return tiny.make_tiny_policy(tmp_path / "model", trained=False)


def weights(policy):
    return {name: np.array(w) for name, w in tree_flatten(policy.model.trainable_parameters())}


def test_an_update_raises_the_objective_and_touches_adapters_only(own_policy):
    before = {name: np.array(w) for name, w in tree_flatten(own_policy.model.parameters())}
    batch = make_batch(groups())
    config = LearningConfig(lr=1e-3, warmup_steps=0, clip_low=1.0, clip_high=100.0)
    updater = Updater(own_policy, config, TEMPERATURE)
    first = updater.update(batch, plan())
    second = updater.update(batch, plan())
    assert first.updated
    assert second.loss < first.loss
    changed = {
        name
        for name, w in tree_flatten(own_policy.model.parameters())
        if not np.array_equal(before[name], np.array(w))
    }
    assert changed
    assert all(name.endswith(("lora_a", "lora_b")) for name in changed)


@pytest.mark.exact
def test_further_updates_of_a_step_clip_around_its_first_pass(tmp_path):
    batch = make_batch(groups())
    held = {"lr": 1e-3, "clip_low": 1e-6, "clip_high": 1e-6}
    policies = [tiny.make_tiny_policy(tmp_path / name, trained=False) for name in "abc"]
    config = LearningConfig(**held, updates_per_step=3)
    whole, parts, single = (Updater(policy, config, TEMPERATURE) for policy in policies)
    stats = whole.update(batch, plan())
    first = parts._apply(batch, plan()).total.logprobs
    for _ in range(2):
        parts._apply(batch, plan(), first)
    single.config = LearningConfig(**held)
    # A single update clips nothing: its pass is the first, so every ratio is 1.
    assert all(clipped(single.update(batch, plan())) == 0 for _ in range(3))
    assert clipped(stats) > 0.1
    assert whole.updates == parts.updates == single.updates == 3
    one, same, other = (weights(policy) for policy in policies)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert any(not np.allclose(one[name], other[name], rtol=1e-3) for name in one)


@pytest.mark.exact
def test_each_mini_batch_has_an_update_of_its_own(tmp_path):
    batch, held = make_batch(groups()), {"lr": 1e-3, "warmup_steps": 0}
    policies = [tiny.make_tiny_policy(tmp_path / name, trained=False) for name in "abc"]
    config = LearningConfig(**held, minibatches=2)
    whole, parts, single = (Updater(policy, config, TEMPERATURE) for policy in policies)
    single.config = LearningConfig(**held)
    stats, one = whole.update(batch, plan()), single.update(batch, plan())
    halves = [replace(shard_batch(batch, n, 2), z=batch.z / 2) for n in range(2)]
    assert all(any(node.trained.any() for node in half.nodes) for half in halves)
    parts.config = LearningConfig(**held)
    each = [parts.update(half, plan()) for half in halves]
    assert (whole.updates, parts.updates, single.updates) == (2, 2, 1)
    same, split, other = (weights(policy) for policy in policies)
    assert all(np.array_equal(same[name], split[name]) for name in same)
    assert any(not np.allclose(same[name], other[name], rtol=1e-3) for name in same)
    # The second mini-batch was scored by the policy after the first.
    assert stats.trained_tokens == one.trained_tokens
    assert stats.logprob_gap_mean != one.logprob_gap_mean
    assert stats.loss == pytest.approx(sum(part.loss for part in each) / 2)
    assert stats.grad_norm == pytest.approx(sum(part.grad_norm for part in each) / 2)


def test_mini_batches_are_on_average_the_whole(policy):
    """Before any has changed the policy; and one without trained tokens has no update."""
    batch = make_batch(groups())
    updater = Updater(policy, LearningConfig(lr=0.0, minibatches=3), TEMPERATURE)
    parts = updater._parts(batch)
    gradients = [updater.gradient(part, plan())[0] for part in parts]
    mean = tree_map(lambda *each: sum(each) / 3, *gradients)
    assert relative_difference(mean, updater.gradient(batch, plan())[0]) < 1e-5
    updater.update(batch, plan())
    assert updater.updates == len(parts)
    many = Updater(policy, LearningConfig(lr=0.0, minibatches=4), TEMPERATURE)
    many.update(batch, plan())
    assert many.updates == 3  # the completions of the last prompt are as good as each other


def clipped(stats):
    return stats.clipped_low + stats.clipped_high


def test_an_empty_batch_changes_nothing(own_policy):
    before = weights(own_policy)
    updater = Updater(own_policy, LearningConfig(), TEMPERATURE)
    stats = updater.update(Batch((), (), 40.0), plan())
    assert not stats.updated
    assert updater.updates == 0
    assert all(np.array_equal(before[name], w) for name, w in weights(own_policy).items())


def test_a_gradient_that_is_not_finite_is_never_applied(own_policy):
    before = weights(own_policy)
    batch = make_batch(groups())
    for node in batch.nodes:
        node.anchor_logprobs[:] = np.nan
    updater = Updater(own_policy, LearningConfig(), TEMPERATURE)
    for _ in range(2):
        assert not updater.update(batch, plan()).updated
    with pytest.raises(LocalRLError, match="not finite 3 times"):
        updater.update(batch, plan())
    assert all(np.array_equal(before[name], w) for name, w in weights(own_policy).items())


def test_the_gradient_norm_is_clipped(own_policy):
    batch = make_batch(groups())
    free = Updater(own_policy, LearningConfig(max_grad_norm=1e9), TEMPERATURE)
    norm = free.update(batch, plan()).grad_norm
    assert norm > 0
    # Adam hides the scale of a first gradient, so look at what it was given.
    held = Updater(own_policy, LearningConfig(max_grad_norm=1e-4), TEMPERATURE)
    given = []
    held.optimizer.update = lambda model, gradient: given.append(global_norm(gradient))
    held.update(batch, plan())
    assert given == [pytest.approx(1e-4, rel=1e-3)]


def test_the_learning_rate_warms_up(own_policy):
    updater = Updater(own_policy, LearningConfig(lr=1.0, warmup_steps=3), TEMPERATURE)
    rates = []
    for updates in range(6):
        updater.updates = updates
        rates.append(updater.learning_rate)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_falls_as_planned(own_policy):
    config = LearningConfig(lr=2.0, warmup_steps=1, lr_schedule="linear")
    updater = Updater(own_policy, config, TEMPERATURE, planned=5)
    rates = []
    for updates in range(5):
        updater.updates = updates
        rates.append(updater.learning_rate)
    assert rates == [1.0, 2.0, 1.5, 1.0, 0.5]


def test_nothing_to_train_leaves_the_optimizer_as_it_is(own_policy):
    updater = Updater(own_policy, LearningConfig(lr=1e-3, warmup_steps=3), TEMPERATURE)
    updater.update(make_batch(groups()), plan())
    moments = optimizer_state(updater)
    before, rate = weights(own_policy), updater.learning_rate
    batch = make_batch(groups())
    for node in batch.nodes:
        node.coefficients[:] = 0
    stats = updater.update(batch, plan())
    assert (stats.updated, stats.drift, stats.loss, stats.trained_tokens) == (False, None, None, 0)
    assert (updater.updates, updater.learning_rate) == (1, rate)
    after = optimizer_state(updater)
    assert moments["step"] == 1
    assert moments.keys() == after.keys()
    assert all(np.array_equal(moments[name], after[name]) for name in moments)
    assert all(np.array_equal(before[name], w) for name, w in weights(own_policy).items())


def optimizer_state(updater):
    return {name: np.array(value) for name, value in tree_flatten(updater.optimizer.state)}


def aged(policy, group, difference):
    """The group as an earlier policy wrote it, whose log-probabilities were less by `difference`.

    Nodes in `difference`, by index, are stale; the others were written by the policy as it is.
    """
    lengths = np.cumsum([len(node.token_ids) for node in group.group.nodes])[:-1]
    now = np.split(np.array(plain_logprobs(policy.model, [group])), lengths)
    nodes = tuple(
        replace(node, sampled_logprobs=values - difference[n], old_logprobs=values)
        if n in difference
        else replace(node, sampled_logprobs=values)
        for n, (node, values) in enumerate(zip(group.group.nodes, now, strict=True))
    )
    return replace(group, group=replace(group.group, nodes=nodes))


def reused():
    """Root 0 with its tail 1, and roots 2 and 3."""
    return scored(forest([-1, 0, -1, -1], leaves=[1, 2, 3], planned_roots=3), [1, 0, 0.25])


@pytest.mark.exact
@pytest.mark.parametrize("shared", [True, False])
def test_stale_tokens_of_the_same_policy_teach_what_fresh_ones_do(policy, shared):
    fresh = aged(policy, reused(), {})
    stale = aged(policy, reused(), dict.fromkeys(range(4), np.zeros(3, np.float32)))
    updater = Updater(policy, LearningConfig(), TEMPERATURE)
    updater.gradient.shared = shared
    one, other = (updater.gradient(make_batch([g]), plan())[0] for g in (fresh, stale))
    for (name, a), (_, b) in zip(tree_flatten(one), tree_flatten(other), strict=True):
        assert np.array_equal(np.array(a), np.array(b)), name
    assert global_norm(one) > 0


@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_of_stale_tokens_equals_the_plain_one(policy, shared):
    # old - sampled; the fresh tail behind root 0 has the prefix's weight, and root 2 none.
    moved = {0: np.float32([0.1, -0.4, 0.2]), 3: np.float32([0.9, -0.5, -0.3])}
    stale = aged(policy, reused(), moved)
    importance = np.exp([0.1, -0.3, -0.1, -0.1, -0.1, -0.1, 0, 0, 0, np.log(2), 0.4, 0.1])
    advantages = [1 - 0.125, 0 - 0.625, 0.25 - 0.5]
    weighted = mx.array(importance * np.repeat(advantages, [6, 3, 3]) / 3)
    old = mx.array(np.array(plain_logprobs(policy.model, [stale])))

    def loss():
        ratio = mx.exp(plain_logprobs(policy.model, [stale]) - old)
        return -(weighted * ratio).sum() / LMAX

    _, expected = nn.value_and_grad(policy.model, loss)()
    updater = Updater(policy, LearningConfig(), TEMPERATURE)
    updater.gradient.shared = shared
    found, _ = updater.gradient(make_batch([stale]), plan())
    assert relative_difference(found, expected) < 1e-5


def test_drift_is_how_far_the_step_has_moved(own_policy):
    shifts = {0: np.float32([0.1, -0.1, 0])}
    step = [aged(own_policy, group, shifts) for group in (reused(), reused())]
    config = LearningConfig(lr=3e-3, warmup_steps=0, updates_per_step=2)
    updater = Updater(own_policy, config, TEMPERATURE)
    # Anchors are what the policy thought at the start of the step, of stale tokens too.
    before = np.array(plain_logprobs(own_policy.model, step))
    stats = updater.update(make_batch(step), plan())
    after = np.array(plain_logprobs(own_policy.model, step))
    assert updater.updates == 2
    assert stats.drift == pytest.approx(np.abs(after - before).mean(), abs=1e-4)
    assert stats.drift > 0.01


@pytest.mark.parametrize(("tokens", "measured"), [(1, 6), (7, 9), (12, 12), (13, 18), (1000, 36)])
def test_drift_is_measured_on_the_first_trees(own_policy, monkeypatch, tokens, measured):
    monkeypatch.setattr(update, "DRIFT_TOKENS", tokens)
    step = [aged(own_policy, reused(), {}) for _ in range(3)]
    step = [replace(g, group=replace(g.group, prompt_ids=(1, 5, n, 2))) for n, g in enumerate(step)]
    step = [aged(own_policy, group, {}) for group in step]
    updater = Updater(own_policy, LearningConfig(lr=3e-3, warmup_steps=0), TEMPERATURE)
    before = np.array(plain_logprobs(own_policy.model, step))
    drift = updater.update(make_batch(step), plan()).drift
    after = np.array(plain_logprobs(own_policy.model, step))
    moved = np.abs(after - before)
    assert drift == pytest.approx(moved[:measured].mean(), abs=1e-5)
    if measured < 36:
        assert drift != pytest.approx(moved.mean(), abs=1e-4)
