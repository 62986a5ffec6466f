from __future__ import annotations

from dataclasses import replace

import pytest
from forests import scored

from localrl.evaluate import judge, summarise, wilson
from localrl.records import Example
from localrl.rollouts.decode import Decoder


@pytest.mark.parametrize(
    ("passed", "n", "interval"),
    # Brown, Cai and DasGupta 2001 give 0.0277 as the upper end for 0 of 135.
    [(0, 135, (0.0, 0.0277)), (135, 135, (0.9723, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson(passed, n, interval):
    assert wilson(passed, n) == pytest.approx(interval, abs=1e-4)


def examples(count):
    return [
        Example(id=str(i), messages=({"role": "user", "content": str(i)},)) for i in range(count)
    ]


def run(policy, rewards):
    chosen = examples(len(rewards))

    def score(groups):
        assert all(len(group.leaves) == 1 for group in groups)
        return [
            replace(scored(group, [reward]), parts={"first": (reward,), "other": (9.0,)})
            for group, reward in zip(groups, rewards, strict=True)
        ]

    found = judge(
        Decoder(policy, 1.0, 16),
        chosen,
        [policy.tokenizer.encode(example.messages) for example in chosen],
        score,
        max_completion_tokens=8,
    )
    return summarise(found, passing="first", temperature=1.0)


def test_a_first_reward_of_one_or_more_passes(policy):
    evaluation = run(policy, [1.5, 0.99, 0.01, 1.0])
    assert evaluation.pass_at_1 == 0.5
    assert evaluation.mean_reward == pytest.approx(3.5 / 4)
    assert evaluation.n == 4
    assert evaluation.passed == (True, False, False, True)
    assert len(evaluation.shown) == 4


def test_a_missing_reward_is_not_a_zero(policy):
    evaluation = run(policy, [1.5, None])
    assert (evaluation.n, evaluation.pass_at_1, evaluation.mean_reward) == (1, 1.0, 1.5)


def test_no_reward_at_all_is_unknown(policy):
    evaluation = run(policy, [None])
    assert (evaluation.n, evaluation.pass_at_1, evaluation.ci95) == (0, None, None)
    assert evaluation.summary()["pass@1"] is None


def test_the_same_policy_gives_the_same_answers(policy):
    one, other = run(policy, [0.0] * 5), run(policy, [0.0] * 5)
    assert one.shown == other.shown
