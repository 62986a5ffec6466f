"""The update against the plainest computation of the same formula."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored
from steps import TEMPERATURE, plan, relative_difference, selection

from localrl.backend import mx, nn, tree_flatten
from localrl.config import LearningConfig
from localrl.errors import LocalRLError
from localrl.learning.credit import assign_credit, token_coefficients
from localrl.learning.objectives import OBJECTIVES, make_objective
from localrl.learning.update import Updater, global_norm
from localrl.records import Batch


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


def plain_gradient(policy, scored_groups, config):
    """The design's formula, row by row: every completion alone, full logits, autodiff."""
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
                            ratio = mx.exp(new - float(node.sampled_logprobs[t]))
                            held = mx.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
                            c = float(coefficients[n][t])
                            total = total - mx.minimum(ratio * c, held * c)
                        place += 1
                    counted.add(n)
        return total / (len(scored_groups) * 40.0)

    return nn.value_and_grad(policy.model, lambda: loss(policy.model))()


# A wide hold lets every token through; the narrow one cuts most of them off.
@pytest.mark.parametrize(
    "config", [LearningConfig(clip_low=1.0, clip_high=100.0), LearningConfig()]
)
@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_equals_the_plain_one(policy, config, shared):
    value, expected = plain_gradient(policy, groups(), config)
    batch = make_batch(groups())
    updater = Updater(policy, config, TEMPERATURE)
    updater.shared = shared
    gradient, total = updater.gradient(batch, plan())
    assert relative_difference(gradient, expected) < 1e-5
    assert total.loss / batch.z == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("micro_rows", "head_chunk"), [(1, 16), (2, 5), (5, 1000), (100, 3)])
def test_any_micro_batch_size_gives_the_same_gradient(policy, micro_rows, head_chunk, shared):
    batch = make_batch(groups())
    updater = Updater(policy, LearningConfig(clip_low=1.0, clip_high=100.0), TEMPERATURE)
    updater.shared = shared
    whole, _ = updater.gradient(batch, plan(micro_rows=100, head_chunk=1000))
    parts, _ = updater.gradient(batch, plan(micro_rows, head_chunk))
    assert relative_difference(parts, whole) < 1e-5


def test_a_model_that_hides_its_states_gets_the_same_gradient(policy):
    from dataclasses import replace

    batch = make_batch(groups())
    config = LearningConfig(clip_low=1.0, clip_high=100.0)
    split, _ = Updater(policy, config, TEMPERATURE).gradient(batch, plan())
    hidden = replace(policy, hidden=None, head=None)
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


def test_several_updates_on_one_batch_are_as_many_single_ones(tmp_path):
    batch = make_batch(groups())
    results = []
    for name, per_step, times in (("a", 3, 1), ("b", 1, 3)):
        policy = tiny.make_tiny_policy(tmp_path / name, trained=False)
        updater = Updater(policy, LearningConfig(lr=1e-3, updates_per_step=per_step), TEMPERATURE)
        for _ in range(times):
            updater.update(batch, plan())
        assert updater.updates == 3
        results.append(weights(policy))
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name])


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
        node.sampled_logprobs[:] = -1e6  # a ratio of infinity
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
    held._optimizer.update = lambda model, gradient: given.append(global_norm(gradient))
    held.update(batch, plan())
    assert given == [pytest.approx(1e-4, rel=1e-3)]


def test_the_learning_rate_warms_up(own_policy):
    updater = Updater(own_policy, LearningConfig(lr=1.0, warmup_steps=3), TEMPERATURE)
    rates = []
    for updates in range(6):
        updater.updates = updates
        rates.append(updater.learning_rate)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
