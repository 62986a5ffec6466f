"""The KL to the reference: estimators, weights, and when it is computed at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from forests import flat_group, forest, scored
from steps import (
    TEMPERATURE,
    gradient,
    plain_logprobs,
    plan,
    pulled_back,
    ragged_group,
    relative_difference,
    selection,
)

from localrl.backend import mx, tree_flatten, tree_map
from localrl.engines.mlx.engine import MLXEngine
from localrl.learning.objective import kl_terms
from localrl.learning.objectives import make_objective
from localrl.learning.update import Updater, global_norm
from localrl.policy.lora import LoRALinear, adapters_off
from localrl.settings import KL_ESTIMATORS, LearningConfig

COEF = 0.5


def test_values_by_hand():
    logprobs, reference = mx.array([-1.0, -2.0]), mx.array([-1.5, -1.0])  # d = 0.5, -1
    ratio = mx.array([1.0, 1.0])
    values = {name: kl_terms(name, logprobs, reference, ratio)[1] for name in KL_ESTIMATORS}
    np.testing.assert_allclose(np.array(values["k1"]), [0.5, -1])
    np.testing.assert_allclose(np.array(values["k2"]), [0.125, 0.5])
    np.testing.assert_allclose(np.array(values["k3"]), [np.exp(-0.5) - 0.5, np.e - 2], rtol=1e-6)


POLICY = mx.array([0.3, -1.0, 0.8, 0.1])
REFERENCE = mx.array([-0.2, 0.4, 0.5, 0.0])
OTHER = mx.array([1.0, 0.2, -0.5, 0.3])


def log_softmax(logits):
    return logits - mx.logsumexp(logits)


def reverse(logits):
    logprobs = log_softmax(logits)
    return (mx.exp(logprobs) * (logprobs - log_softmax(REFERENCE))).sum()


def forward(logits):
    reference = log_softmax(REFERENCE)
    return (mx.exp(reference) * (reference - log_softmax(logits))).sum()


def expectation(name, part, sampler):
    """A function of the logits: the mean loss (0) or value (1) of what the sampler draws."""
    drawn = log_softmax(sampler)

    def mean(logits):
        logprobs = log_softmax(logits)
        terms = kl_terms(name, logprobs, log_softmax(REFERENCE), mx.exp(logprobs - drawn))
        return (mx.exp(drawn) * terms[part]).sum()

    return mean


@pytest.mark.parametrize(
    ("name", "sampler", "divergence"),
    [
        ("k1", POLICY, reverse),
        ("k1", OTHER, reverse),  # the ratio makes up for another sampler
        ("k2", POLICY, reverse),
        ("k3", POLICY, forward),
    ],
)
def test_the_mean_gradient_is_that_of_a_divergence(name, sampler, divergence):
    found = mx.grad(expectation(name, 0, sampler))(POLICY)
    np.testing.assert_allclose(np.array(found), np.array(mx.grad(divergence)(POLICY)), atol=1e-6)


def test_the_mean_values_of_k1_and_k3_are_the_divergence():
    values = {name: expectation(name, 1, POLICY)(POLICY).item() for name in KL_ESTIMATORS}
    true = reverse(POLICY).item()
    assert values["k1"] == pytest.approx(true, rel=1e-5)
    assert values["k3"] == pytest.approx(true, rel=1e-5)
    assert values["k2"] != pytest.approx(true, rel=0.02)


def numpy_kl(name, new, reference, old):
    """(d loss / d new, value) per token, from the estimators' definitions."""
    d = new - reference
    if name == "k1":
        return np.exp(new - old) * d, d
    return (d, d**2 / 2) if name == "k2" else (1 - np.exp(-d), np.exp(-d) - 1 + d)


def reference_logprobs(policy, groups):
    with adapters_off(policy.model):
        return np.array(plain_logprobs(policy.model, groups)).astype(np.float64)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize(
    ("objective", "shares"),
    [
        # Two prompts; lengths 1, 3, 2 and 2, 4. Shares over Z, by completion.
        ("clipped", np.array([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]) / (2 * 40)),
        ("grpo", np.array([1 / 3, 1 / 9, 1 / 6, 1 / 4, 1 / 8]) / 2),
        ("dapo", np.array([1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6]) / 2),
        ("bnpo", np.array([1, 1, 1, 1, 1]) / 12),
    ],
)
def test_gradient_and_value_against_numpy(policy, name, objective, shares):
    # Equal rewards: all of the gradient is the KL's, and groups without signal are kept for it.
    groups = [
        scored(ragged_group((1, 3, 2)), [1, 1, 1]),
        scored(ragged_group((2, 4)), [0, 0]),
    ]
    new = np.array(plain_logprobs(policy.model, groups)).astype(np.float64)
    old = np.full(12, -1.0)
    slopes, values = numpy_kl(name, new, reference_logprobs(policy, groups), old)
    weights = np.repeat(shares, [1, 3, 2, 2, 4])
    settings = {"objective": objective, "kl_coef": COEF, "kl_estimator": name}
    found, loss = gradient(policy, groups, **settings)
    expected = pulled_back(policy, groups, COEF * weights * slopes)
    assert relative_difference(found, expected) < 1e-5
    if name != "k1":
        assert loss == pytest.approx(COEF * (weights * values).sum(), rel=1e-4)
    batch = selection(make_objective(LearningConfig(**settings)), groups).batch
    total = Updater(policy, LearningConfig(**settings), TEMPERATURE).gradient(batch, plan())[1]
    mean = (weights * values).sum() / weights.sum()
    assert total.stats(1.0, 1.0).kl == pytest.approx(mean, rel=1e-4)


def test_the_kl_adds_to_the_surrogate(policy):
    groups = [scored(ragged_group((1, 3, 2)), [1, 0, 0.25])]
    equal = [scored(group.group, [1, 1, 1]) for group in groups]
    both, _ = gradient(policy, groups, kl_coef=COEF)
    surrogate, _ = gradient(policy, groups)
    kl, _ = gradient(policy, equal, kl_coef=COEF)
    assert relative_difference(both, tree_map(mx.add, surrogate, kl)) < 1e-5
    assert global_norm(kl) > 1e-3 * global_norm(surrogate)


def test_a_shared_token_is_penalised_once():
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [1, 1, 1])
    nodes = selection(make_objective(LearningConfig(kl_coef=COEF)), [tree]).batch.nodes
    assert [node.kl_weights.tolist() for node in nodes] == [
        [COEF * omega] * 3 for omega in (1 / 2, 1 / 2, 1 / 4, 1 / 4)
    ]


def test_neither_foreign_tokens_nor_completions_without_reward_are_penalised():
    group = scored(flat_group(3, sampled=[True, False, True]), [1, 1, None])
    nodes = selection(make_objective(LearningConfig(kl_coef=COEF)), [group]).batch.nodes
    assert [node.kl_weights.tolist() for node in nodes] == [
        [COEF / 2, 0, COEF / 2], [COEF / 2, 0, COEF / 2], [0, 0, 0]
    ]  # fmt: skip


def test_without_a_coefficient_the_reference_is_never_scored(policy, monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(policy.model.layers[0].self_attn.q_proj.scale)
        return token_logprobs(*args, **kwargs)

    token_logprobs = MLXEngine.token_logprobs
    monkeypatch.setattr(MLXEngine, "token_logprobs", counting)
    groups = [scored(ragged_group((1, 3, 2)), [1, 0, 0.25])]
    gradient(policy, groups, micro_rows=1)
    tried = [2.0] * 2  # whether forests score as rows do
    assert calls == tried + [2.0] * 3
    calls.clear()
    gradient(policy, groups, micro_rows=1, kl_coef=COEF)
    assert calls == tried + [0.0, 2.0] * 3


def scales(model):
    return [module.scale for module in model.modules() if isinstance(module, LoRALinear)]


def test_adapters_off_is_the_base_and_ends_after_an_error(policy, tmp_path):
    fresh = tiny.make_tiny_policy(tmp_path / "model", trained=False)
    groups = [scored(ragged_group((1, 3, 2)), [1, 0, 0])]
    base = np.array(plain_logprobs(fresh.model, groups))
    np.testing.assert_allclose(reference_logprobs(policy, groups), base, atol=1e-5)
    before = scales(policy.model)

    def fail():
        with adapters_off(policy.model):
            assert set(scales(policy.model)) == {0.0}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert scales(policy.model) == before == [2.0] * len(before)


def given(policy):
    """The policy as of a run that begins with its adapters."""
    return replace(policy, reference=dict(tree_flatten(policy.model.trainable_parameters())))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_a_run_that_begins_with_an_adapter_is_measured_from_it(tmp_path, name):
    policy = tiny.make_tiny_policy(tmp_path / "model", bits=None)
    groups = [scored(ragged_group((1, 3, 2)), [1, 1, 1])]
    settings = {"kl_coef": COEF, "kl_estimator": name}
    begun = given(policy)
    found, loss = gradient(begun, groups, **settings)
    assert abs(loss) < 1e-6
    assert global_norm(found) < 1e-4 * global_norm(gradient(policy, groups, **settings)[0])
    # Later it is still measured from there: as by hand, with the adapters in their place.
    start = np.array(plain_logprobs(policy.model, groups)).astype(np.float64)
    tiny.stir(policy.model, 1)
    new = np.array(plain_logprobs(policy.model, groups)).astype(np.float64)
    slopes, _ = numpy_kl(name, new, start, np.full(6, -1.0))
    found, _ = gradient(begun, groups, **settings)
    expected = pulled_back(policy, groups, COEF * slopes / (3 * 40))
    assert relative_difference(found, expected) < 1e-5


def test_other_adapters_end_after_an_error(policy):
    own = dict(tree_flatten(policy.model.trainable_parameters()))
    other = {name: 0 * array for name, array in own.items()}

    def fail():
        with replace(policy, reference=other).as_reference():
            (now, *_) = dict(tree_flatten(policy.model.trainable_parameters())).values()
            assert not now.any().item()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    now = dict(tree_flatten(policy.model.trainable_parameters()))
    assert all(now[name] is own[name] for name in own)


def test_an_error_in_the_reference_leaves_the_adapters_on(policy, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(MLXEngine, "token_logprobs", broken)
    with pytest.raises(MemoryError):
        gradient(policy, [scored(ragged_group((1, 3)), [1, 0])], kl_coef=COEF)
    assert set(scales(policy.model)) == {2.0}


def test_a_group_that_is_kept_for_its_kl_is_logged_as_kept():
    groups = [scored(ragged_group((1, 3)), [1, 1]), scored(ragged_group((2, 2)), [1, 0])]
    with_kl = selection(make_objective(LearningConfig(kl_coef=COEF)), groups)
    assert (with_kl.informative, with_kl.kept) == ((False, True), (True, True))
    assert with_kl.kept[0]
    without = selection(make_objective(LearningConfig()), groups)
    assert (without.informative, without.kept) == ((False, True), (False, True))
    assert not without.kept[0]
