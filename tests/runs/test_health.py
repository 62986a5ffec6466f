"""Warnings: each kind once, from made-up metrics; none where a run is as it should be."""

from __future__ import annotations

import pytest

from localrl.config import RunConfig
from localrl.runs.health import CLEAR, Health

GOOD = {
    "reward": 0.5,
    "rewards/right/mean": 0.5,
    "rewards/right/std": 0.5,
    "rewards/form/mean": 0.9,
    "rewards/form/std": 0.3,
    "frac_reward_zero_std": 0.5,
    "entropy": 0.5,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.0,
    "update/applied": True,
    "update/relative_size": 1e-3,
}
WEIGHTS = {"right": 1.0, "form": 0.2}


def told(records, weights=WEIGHTS, **settings):
    """(step, name) of all warnings, and the texts."""
    health = Health(RunConfig.create({"model.path": "any", **settings}), weights)
    found = [(step, w) for step, r in enumerate(records, 1) for w in health.see({**GOOD, **r})]
    return [(step, w.name) for step, w in found], [w.text for _, w in found]


def test_nothing_is_said_of_a_run_that_is_as_it_should_be():
    assert told([{}] * 100) == ([], [])


def test_a_collapse_is_told_once_the_reward_stays():
    steps = [{}] * 5 + [{"entropy": 0.04}] * 30
    names, texts = told(steps)
    # Twenty steps are needed to see that the reward does not rise.
    assert names == [(20, "entropy_collapse")]
    assert "0.04 nats per token, 8% of its initial 0.5" in texts[0]
    assert "learning.lr (now 5e-05)" in texts[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda n: {"reward": 0.5 + 0.005 * n},  # it still learns
        lambda n: {"rewards/right/mean": 0.95},  # it has learned: certainty is what was wanted
        lambda n: {"entropy": 0.06},  # not low enough
    ],
)
def test_low_entropy_alone_is_no_collapse(change):
    steps = [{}] * 5 + [{"entropy": 0.04, **change(n)} for n in range(60)]
    assert told(steps) == ([], [])


def test_lengths_that_run_away():
    longer = [{"completions/mean_length": 20.0 + 2 * n} for n in range(40)]
    names, texts = told(longer)
    # The first five have 24 tokens; 48 is the mean of the steps 13 to 17, but 20 are needed.
    assert names == [(20, "length_runaway")]
    assert "54 tokens, 2.2 times the initial 24" in texts[0]
    assert "rollout.max_completion_tokens (now 256)" in texts[0]
    assert told([{**r, "reward": 0.01 * n} for n, r in enumerate(longer)]) == ([], [])
    short = [{"completions/mean_length": 3.0 + n / 5} for n in range(40)]
    assert told(short) == ([], [])


def test_truncation_above_thirty_per_cent():
    assert told([{"completions/clipped_ratio": 0.3}] * 30) == ([], [])
    names, texts = told([{"completions/clipped_ratio": 0.31}] * 30)
    assert names == [(5, "truncation")]
    assert texts[0].startswith("31% of the completions of the last 5 steps")


def test_a_warning_comes_again_only_after_it_was_over_for_long():
    cut, whole = {"completions/clipped_ratio": 0.5}, {}
    blip = [cut] * 10 + [whole] * (CLEAR - 5) + [cut] * 10
    assert [step for step, _ in told(blip)[0]] == [5]
    # Of five steps two uncut ones bring the mean to 0.3: over from the second one on.
    over = [cut] * 10 + [whole] * (CLEAR + 10) + [cut] * 10
    assert [step for step, _ in told(over)[0]] == [5, 44]


def test_equal_rewards_for_many_steps():
    names, texts = told([{}] * 3 + [{"frac_reward_zero_std": 1.0, "reward": 0.0}] * 12)
    assert names == [(13, "equal_rewards")]
    assert "the mean is 0, and nothing is learned" in texts[0]
    learned = {"frac_reward_zero_std": 1.0, "rewards/right/mean": 1.0}
    assert "the task is learned" in told([learned] * 12)[1][0]
    assert told([{"frac_reward_zero_std": 0.99}] * 30) == ([], [])
    alone = {"rollout.group_size": 1}
    assert told([{"frac_reward_zero_std": 1.0}] * 30, **alone) == ([], [])


@pytest.mark.parametrize(
    ("form_std", "weight", "expected"),
    [
        # (4 * 0.5)^2 = 4 beside 0.25: 94 %, then 4.2 * 0.5 beside it: 94.6 %, 5: 96 %.
        (0.5, 4.0, []),
        (0.5, 5.0, [(10, "dominant_reward")]),
    ],
)
def test_a_shaping_reward_that_decides_alone(form_std, weight, expected):
    steps = [{"rewards/form/std": form_std}] * 20
    names, texts = told(steps, {"right": 1.0, "form": weight})
    assert names == expected
    if texts:
        assert "'form' causes 96%" in texts[0]
        assert "(now right 1, form 5)" in texts[0]


def test_the_first_reward_may_decide_alone_and_constant_ones_do_not_count():
    assert told([{"rewards/form/std": 0.01}] * 20) == ([], [])
    assert told([{"rewards/right/std": 0.0}] * 20) == ([], [])
    assert told([{"rewards/right/std": None, "rewards/form/std": None}] * 20) == ([], [])


def test_a_rate_without_effect():
    names, texts = told([{"update/relative_size": 3e-7}] * 30)
    assert names == [(20, "no_effect")]
    assert "After 20 updates" in texts[0]
    assert "3e-07" in texts[0]
    skipped = {"update/relative_size": None, "update/applied": False}
    assert told([skipped] * 30) == ([], [])


def test_a_sampler_that_is_another_policy():
    gap = "sampling/sampling_logp_difference/mean"
    assert told([{gap: 0.06}] * 30) == ([], [])  # bfloat16
    names, texts = told([{gap: 0.04}] * 5 + [{gap: 0.5}] * 10)
    # 0.04 four times and 0.5 are 0.13 in the mean.
    assert names == [(6, "sampler_gap")]
    assert "0.13 nats per token" in texts[0]
    assert "model.dtype=fp32" in texts[0]


def test_evaluations_and_unknown_numbers_are_passed_over():
    health = Health(RunConfig.create({"model.path": "any"}), WEIGHTS)
    assert health.see({"step": 0, "eval/pass@1": 0.5}) == []
    nothing = dict.fromkeys(GOOD)
    found = [warning.name for _ in range(40) for warning in health.see(nothing)]
    assert found == ["no_reward"]


def test_a_step_without_any_reward_is_told_before_the_run_ends():
    names, texts = told([{}, {"reward": None}, {"reward": None}, {"reward": 0.0}])
    assert names == [(2, "no_reward")]
    assert "right, form gave None for all" in texts[0]
    assert "ends after 3 such steps" in texts[0]
