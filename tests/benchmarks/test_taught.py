"""Targets drawn from the teacher estimate the gradient of the forward KL that they stand for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enumerated import (
    PROMPT,
    Measured,
    all_logprobs,
    examples,
    flattened,
    make_files,
    opened,
    padded,
)

from localrl.backend import mx, nn
from localrl.records import ScoredGroup

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from taught import Taught, TaughtNode, with_teacher

ANSWER = "s"
DRAWS = 400


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    settings = {"rollout.group_size": 8, "model.engine": "cpu", "memory.threads": 1}
    with opened(make_files(folder), folder / "run", settings) as session:
        yield with_teacher(session)


@pytest.fixture(scope="module")
def scored(session) -> ScoredGroup:
    """A group with right completions, wrong ones, and one without a reward."""
    [example] = examples(1, 1)
    [found] = session.sampler.collect(1, [replace(example, answer=ANSWER)], 1)
    assert {0.0, 1.0} <= set(found.rewards)
    failed = found.rewards.index(0.0)
    rewards = tuple(None if i == failed else r for i, r in enumerate(found.rewards))
    assert 0.0 in rewards
    return replace(found, rewards=rewards)


def batch(session: Taught, scored: ScoredGroup, step: int) -> Any:
    return session.select(step, [scored], [session.credit(step, scored)]).batch


def exact(session: Taught, scored: ScoredGroup) -> np.ndarray:
    """Compute the gradient (P,) of the wrong completions' cross-entropy to the teacher."""
    nodes = scored.group.nodes
    wrong = [n.token_ids for n, r in zip(nodes, scored.rewards, strict=True) if r == 0]
    ids, mask = padded(wrong)
    with session.policy.as_reference():
        teacher = mx.exp(all_logprobs(session, PROMPT + ANSWER + PROMPT, ids))
        mx.eval(teacher)

    def loss() -> mx.array:
        return -(mask[..., None] * teacher * all_logprobs(session, PROMPT, ids)).sum()

    rewarded = [n for n, r in zip(nodes, scored.rewards, strict=True) if r is not None]
    tokens = sum(len(node.token_ids) for node in rewarded)
    return flattened(nn.value_and_grad(session.policy.model, loss)()[1]) / tokens


def test_the_mean_over_draws_is_the_gradient_of_the_forward_kl(session, scored):
    found = []
    for step in range(1, DRAWS + 1):
        gradient, _ = session.updater.gradient(batch(session, scored, step), session.plan)
        found.append((flattened(gradient), 1.0))
    measured = Measured.of(found, exact(session, scored))
    assert measured.scale == pytest.approx(1, abs=3 * measured.scale_se)
    assert measured.scale_se < 0.03
    assert measured.across < 0.01 + 3 * measured.across_se


def test_only_wrong_completions_are_taught(session, scored):
    nodes = batch(session, scored, 1).nodes
    assert all(isinstance(node, TaughtNode) for node in nodes)
    assert [node.trained.any() for node in nodes] == [reward == 0 for reward in scored.rewards]


def test_a_group_of_right_completions_is_left_out(session, scored):
    right = replace(scored, rewards=(1.0,) * len(scored.rewards))
    found = session.select(1, [right, scored], [session.credit(1, g) for g in (right, scored)])
    assert found.kept == (False, True)
    assert len(found.batch.nodes) == len(scored.rewards)


def test_draws_have_keys(session, scored):
    one, same, other = (batch(session, scored, step).nodes for step in (1, 1, 2))
    assert all((a.targets == b.targets).all() for a, b in zip(one, same, strict=True))
    assert any((a.targets != b.targets).any() for a, b in zip(one, other, strict=True))
