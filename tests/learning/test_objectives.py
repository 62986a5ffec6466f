"""Every objective against its paper's formula, written out in numpy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from forests import flat_group, forest, scored
from steps import (
    LMAX,
    gradient,
    plain_logprobs,
    pulled_back,
    ragged_group,
    relative_difference,
    selection,
)

from localrl import settings
from localrl.backend import tree_map
from localrl.errors import ConfigError
from localrl.learning.credit import assign_credit
from localrl.learning.objectives import OBJECTIVES, Objective, make_objective, token_shares
from localrl.learning.update import global_norm
from localrl.learning.weighting import weighting_names
from localrl.settings import LearningConfig

LENGTHS = ((1, 3, 2), (2, 4))
REWARDS = ((1.0, 0.0, 0.25), (0.0, 1.0))
RATIOS = (
    ((1.25,), (0.7, 6.0, 1.0), (0.9, 1.3)),
    ((0.75, 1.1), (1.0001, 1.0, 0.9999, 1.0002)),
)
"""Two prompts, in a later update of a step. Some ratios to its first pass lie beyond each of the
clip ranges, and on both sides of each."""
EXACT = tuple(tuple((1.0,) * n for n in lengths) for lengths in LENGTHS)
ROUNDED = (
    ((1.05,), (0.9, 1.4, 1.0), (0.96, 3.0)),
    ((0.2, 1.0), (1.1, 0.97, 2.5, 1.02)),
)
"""Probability of the first pass over the sampler's: equal, and not, some by more than 2."""


def step(policy, ratios=RATIOS, rounding=EXACT):
    """The two prompts' groups, sampled so that the policy's ratios are these; `new`; `first`."""
    pairs = zip(LENGTHS, REWARDS, strict=True)
    groups = [scored(ragged_group(lengths), rewards) for lengths, rewards in pairs]
    flat = np.array(plain_logprobs(policy.model, groups)).astype(np.float64)
    new, first, place = [], [], 0
    for group, wanted, rounded in zip(groups, ratios, rounding, strict=True):
        new.append([])
        first.append([])
        for node, ratio, factor in zip(group.group.nodes, wanted, rounded, strict=True):
            new[-1].append(flat[place : place + len(ratio)])
            first[-1].append(np.float32(new[-1][-1] - np.log(ratio)))
            node.sampled_logprobs[:] = first[-1][-1] - np.log(factor)
            place += len(ratio)
    return groups, new, first


def flat(families):
    return [values for family in families for values in family]


# The papers' formulas. new, first: log-probabilities (|y|,) by completion, now and in the step's
# first pass; fixed: new, detached; w: weights that correct for the sampler.


def others(rewards):
    return [r - np.mean([*rewards[:i], *rewards[i + 1 :]]) for i, r in enumerate(rewards)]


def centred(rewards):
    return np.array(rewards) - np.mean(rewards)


def standard(rewards):
    return centred(rewards) / (np.std(rewards, ddof=1) + 1e-4)


def surrogate(ratio, advantage, low, high):
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def token_sums(new, first, advantages, w, low, high):
    """One sum of clipped terms per completion."""
    return np.array(
        [
            (v * surrogate(np.exp(n - o), a, low, high)).sum()
            for n, o, a, v in zip(new, first, advantages, w, strict=True)
        ]
    )


def sizes(new):
    return np.array([len(n) for n in new])


def clipped(rewards, new, first, fixed, w):
    return np.mean(token_sums(new, first, others(rewards), w, 0.2, 0.28)) / LMAX


def grpo(rewards, new, first, fixed, w):
    return np.mean(token_sums(new, first, standard(rewards), w, 0.2, 0.2) / sizes(new))


def dr_grpo(rewards, new, first, fixed, w):
    return np.mean(token_sums(new, first, centred(rewards), w, 0.2, 0.2)) / LMAX


def dapo(rewards, new, first, fixed, w):
    return token_sums(new, first, standard(rewards), w, 0.2, 0.28).sum() / sizes(new).sum()


def cispo(rewards, new, first, fixed, w):
    total = 0.0
    for n, o, f, a, v in zip(new, first, fixed, standard(rewards), w, strict=True):
        total += (v * np.minimum(np.exp(f - o), 5) * a * n).sum()
    return total / sizes(new).sum()


def gspo(rewards, new, first, fixed, w):
    s = np.array([np.exp(np.mean(n - o)) for n, o in zip(new, first, strict=True)])
    return np.mean([v.mean() for v in w] * surrogate(s, standard(rewards), 3e-4, 4e-4))


def rloo(rewards, new, first, fixed, w):
    pairs = zip(others(rewards), new, w, strict=True)
    return np.mean([a * (v * n).sum() for a, n, v in pairs]) / LMAX


PER_PROMPT = {f.__name__: f for f in (clipped, grpo, dr_grpo, dapo, cispo, gspo, rloo)}
"""What each paper maximises for one prompt; the step's loss is minus the mean over prompts."""


def paper_loss(name, new, first, fixed, w):
    arguments = list(zip(REWARDS, new, first, fixed, w, strict=True))
    if name == "bnpo":  # one mean over the tokens of all prompts
        sums = [token_sums(n, o, standard(r), v, 0.2, 0.2).sum() for r, n, o, _, v in arguments]
        return -sum(sums) / sum(sizes(n).sum() for n in new)
    return -np.mean([PER_PROMPT[name](*argument) for argument in arguments])


def paper_derivative(name, new, first, w, h=1e-6):
    """d loss / d log-probability of every token, by central differences in float64."""
    found = []
    for prompt in range(len(new)):
        for completion in range(len(new[prompt])):
            for t in range(len(new[prompt][completion])):
                sides = []
                for shift in (h, -h):
                    moved = [[n.copy() for n in family] for family in new]
                    moved[prompt][completion][t] += shift
                    sides.append(paper_loss(name, moved, first, new, w))
                found.append((sides[0] - sides[1]) / (2 * h))
    return np.array(found)


@pytest.mark.parametrize("rounding", [EXACT, ROUNDED], ids=["float32", "16 bits"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_the_papers(policy, name, rounding):
    groups, new, first = step(policy, rounding=rounding)
    w = [[np.minimum(factor, 2) for factor in family] for family in rounding]
    found, loss = gradient(policy, groups, first=flat(first), objective=name)
    nearly = 0.0 if rounding is EXACT else 1e-7  # the terms of one loss nearly cancel
    assert loss == pytest.approx(paper_loss(name, new, first, new, w), rel=1e-5, abs=nearly)
    expected = pulled_back(policy, groups, paper_derivative(name, new, first, w))
    assert relative_difference(found, expected) < 1e-5


def test_every_two_objectives_pull_in_different_directions(policy):
    groups, _, first = step(policy)
    directions = {}
    for name in OBJECTIVES:
        found, _ = gradient(policy, groups, first=flat(first), objective=name)
        norm = global_norm(found)
        directions[name] = tree_map(lambda g, norm=norm: g / norm, found)
    for one, other in combinations(OBJECTIVES, 2):
        assert relative_difference(directions[one], directions[other]) > 1e-3, (one, other)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        # A / (X G Lmax), with X = 2 prompts, G = 3 and 2 completions, Lmax = 40.
        ("clipped", lambda r, n, step: others(r) / np.float64(2 * len(r) * LMAX)),
        ("rloo", lambda r, n, step: others(r) / np.float64(2 * len(r) * LMAX)),
        ("dr_grpo", lambda r, n, step: centred(r) / (2 * len(r) * LMAX)),
        # A / (X G |y|)
        ("grpo", lambda r, n, step: standard(r) / (2 * len(r) * np.array(n))),
        ("gspo", lambda r, n, step: standard(r) / (2 * len(r) * np.array(n))),
        # A / (X tokens of the prompt), A / tokens of the step
        ("dapo", lambda r, n, step: standard(r) / (2 * sum(n))),
        ("cispo", lambda r, n, step: standard(r) / (2 * sum(n))),
        ("bnpo", lambda r, n, step: standard(r) / step),
    ],
)
def test_on_fresh_rollouts_all_are_reinforce(policy, name, per_token):
    groups, _, _ = step(policy, EXACT)
    found, _ = gradient(policy, groups, objective=name)
    derivative = []
    for lengths, rewards in zip(LENGTHS, REWARDS, strict=True):
        coefficients = per_token(rewards, lengths, sum(map(sum, LENGTHS)))
        derivative += [-c for c, n in zip(coefficients, lengths, strict=True) for _ in range(n)]
    expected = pulled_back(policy, groups, np.array(derivative))
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_micro_batch_size_gives_the_same_gradient(policy, name):
    groups, _, first = step(policy, rounding=ROUNDED)
    for known in (None, flat(first)):
        whole, _ = gradient(policy, groups, 100, known, objective=name)
        for micro_rows in (1, 2):
            parts, _ = gradient(policy, groups, micro_rows, known, objective=name)
            assert relative_difference(parts, whole) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_length_bias(name):
    group = scored(ragged_group((10, 100, 5)), [1, 1, 0])
    nodes = selection(OBJECTIVES[name], [group]).batch.nodes
    short, long = nodes[0].coefficients, nodes[1].coefficients
    factor = 10 if name in ("grpo", "gspo") else 1
    np.testing.assert_allclose(short, factor * long[0])
    np.testing.assert_allclose(long, long[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_completion_without_a_reward_is_as_good_as_not_sampled(policy, name):
    four = ragged_group((3, 1, 2, 4))
    three = ragged_group((3, 1, 2))
    one, loss = gradient(policy, [scored(four, [1, 0, 0.5, None])], objective=name)
    other, same = gradient(policy, [scored(three, [1, 0, 0.5])], objective=name)
    assert loss == pytest.approx(same, rel=1e-5)
    assert relative_difference(one, other) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_signal_is_an_empty_batch(name):
    for rewards in ([1, 1], [None, None], [1, None]):
        assert selection(OBJECTIVES[name], [scored(flat_group(2), rewards)]).batch.nodes == ()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_forest_with_forks(policy, name):
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    if name in ("grpo", "gspo"):
        with pytest.raises(ConfigError, match=r"share tokens.*Sample flat groups"):
            gradient(policy, [tree], objective=name)
    else:
        assert global_norm(gradient(policy, [tree], objective=name)[0]) > 0


def test_a_shared_token_counts_once_in_the_mean_length():
    tree = scored(forest([-1, -1, 0, 0], leaves=[1, 2, 3], planned_roots=2), [0, 1, 0])
    nodes = selection(OBJECTIVES["dapo"], [tree]).batch.nodes
    # omega 1/2, 1/2, 1/4, 1/4 times 3 tokens: T = 4.5. Rewards 0, 1, 0: std 1 / sqrt(3).
    scale = (2 / 3) / (np.sqrt(1 / 3) + 1e-4)
    advantages = np.array([0.5, -0.5, 1, -1]) * scale
    expected = np.array([1 / 2, 1 / 2, 1 / 4, 1 / 4]) / 4.5 * advantages
    np.testing.assert_allclose([node.coefficients[0] for node in nodes], expected, rtol=1e-6)


def test_a_chain_without_forks_is_one_completion():
    chain = forest([-1, -1, 0], leaves=[1, 2], planned_roots=2)
    shares = token_shares(OBJECTIVES["grpo"], chain, assign_credit(scored(chain, [0, 1])))
    assert shares == pytest.approx([1 / 2 / 6, 1 / 2 / 3, 1 / 2 / 6])


def test_settings_win_over_the_paper():
    assert make_objective(LearningConfig()) == OBJECTIVES["clipped"]
    given = make_objective(
        LearningConfig(objective="grpo", prompt_weight="none", clip_high=0.3, kl_coef=0.1)
    )
    assert given == Objective("none", "sequence", "token", 0.2, 0.3, kl_coef=0.1)


def test_a_clip_range_that_would_do_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"learning\.clip_high is 0\.3, but rloo has no ratio"):
        make_objective(LearningConfig(objective="rloo", clip_high=0.3))


def test_the_configuration_offers_what_there_is():
    assert set(settings.OBJECTIVES) == set(OBJECTIVES)
    assert set(settings.PROMPT_WEIGHTS) == set(weighting_names())
