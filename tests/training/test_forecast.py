"""The expected duration of a run, and evaluations that follow the speed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from localrl import RunConfig, train
from localrl.rollouts.pace import Pace
from localrl.runs.logs import read_jsonl
from localrl.training import evaluating
from localrl.training.forecast import Forecast, informative_share
from localrl.training.session import NullProgress

CALL_S, ROW_S, PROMPT_S = 0.01, 0.002, 0.05


def measured(rows=range(1, 33)):
    pace = Pace()
    for count in rows:
        pace.stepped(count, CALL_S + ROW_S * count)
    pace.read(8, 8 * PROMPT_S)
    return pace


def test_the_line_is_found_again():
    assert measured().line() == pytest.approx((CALL_S, ROW_S))


@pytest.mark.parametrize("seconds", [[0.5, 0.4, 0.3], [0.1, 0.4, 0.9]])
def test_neither_part_of_the_line_is_negative(seconds):
    pace = Pace()
    for rows, value in zip((1, 2, 3), seconds, strict=True):
        pace.stepped(rows, value)
    call_s, row_s = pace.line()
    assert min(call_s, row_s) >= 0
    assert 3 * call_s + 6 * row_s == pytest.approx(sum(seconds))


def test_nothing_measured_takes_no_time():
    assert Pace().line() == (0.0, 0.0)


@pytest.mark.parametrize(("completions", "rows"), [(32, 64), (32, 8), (256, 32)])
def test_expected_sampling_is_that_of_a_simulated_decoder(completions, rows):
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 500)

    def simulated():
        waiting, live, seconds = list(rng.choice(lengths, completions)), [], 0.0
        while waiting or live:
            while waiting and len(live) < rows:
                live.append(waiting.pop())
            seconds += CALL_S + ROW_S * len(live)
            live = [left - 1 for left in live if left > 1]
        return seconds + 4 * PROMPT_S

    expected = measured().expected_s(4, lengths.tolist(), completions, rows)
    assert expected == pytest.approx(np.mean([simulated() for _ in range(40)]), rel=0.15)


def forecast(**changes):
    settings = {"run.steps": 10, **{f"run.{name}": value for name, value in changes.items()}}
    made = Forecast.of(RunConfig.create(settings), evaluates=True)
    made.step_s, made.evaluation_s = 2.0, 5.0
    return made


def test_what_is_left_counts_steps_and_evaluations():
    assert forecast().left_s(0, 0.0) == 10 * 2 + 5
    assert forecast().left_s(10, 20.0) == 0
    assert forecast(eval_every=3).left_s(0, 0.0) == 10 * 2 + 4 * 5  # after 3, 6, 9 and 10
    assert forecast(eval_every=3).left_s(3, 0.0) == 7 * 2 + 3 * 5
    assert forecast(eval_every=5).left_s(0, 0.0) == 10 * 2 + 2 * 5
    assert forecast(minutes=0.2).left_s(4, 8.0) == 4 + 5


def test_steps_replace_what_was_expected_and_the_first_counts_no_longer():
    made = forecast()
    made.stepped(9.0)
    assert made.step_s == 9.0
    made.stepped(3.0)
    made.stepped(3.0)
    assert made.step_s == 3.0


def test_groups_of_equal_rewards_cost_no_gradient():
    assert informative_share([0.0] * 9, 2, tracked=True) == 0
    assert informative_share([], 2, tracked=True) == 0
    assert informative_share([1.0, *[0.0] * 9], 2, tracked=True) == 1
    assert informative_share([0.0] * 9, 8, tracked=False) == 0
    rewards = [1.0, 0.5, 0.5, 0.0]
    draws = np.random.default_rng(0).choice(rewards, (4000, 3))
    drawn = np.mean([len(set(group)) > 1 for group in draws])
    assert informative_share(rewards, 3, tracked=False) == pytest.approx(drawn, abs=0.02)


def test_nothing_is_claimed_before_anything_is_known():
    assert Forecast.of(RunConfig.create({}), evaluates=True).left_s(0, 0.0) is None


@pytest.mark.parametrize(
    ("seconds", "count"), [(1.0, 256), (30.0, 256), (60.0, 128), (100.0, 64), (1e6, 64)]
)
def test_as_many_prompts_as_four_minutes_allow(seconds, count):
    assert evaluating.affordable(256, seconds) == count


class Listener(NullProgress):
    def __init__(self):
        self.lines, self.expected = [], None

    def begin(self, session):
        self.session = session

    def evaluated(self, step, evaluation):
        if step == 0:
            self.expected = self.session.forecast.left_s(0, 0.0)

    def warn(self, line):
        self.lines.append(line)


SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 4,
    "run.steps": 2,
}


def test_a_slow_evaluation_uses_fewer_prompts_before_and_after(tiny_folder, tmp_path, monkeypatch):
    """Seconds are injected: a clock that says that each prompt takes four."""
    ticks = SimpleNamespace(now=0.0)

    def judge(decoder, examples, *args, **settings):
        ticks.now += 4.0 * len(examples)
        return real(decoder, examples, *args, **settings)

    real = evaluating.judge
    monkeypatch.setattr(evaluating, "LARGE", 0)
    monkeypatch.setattr(evaluating, "judge", judge)
    monkeypatch.setattr(evaluating.time, "perf_counter", lambda: ticks.now)
    settings = {"model.path": str(tiny_folder), "run.out": str(tmp_path / "run"), **SMALL}
    listener = Listener()
    result = train(RunConfig.create(settings), progress=listener)
    assert (len(result.base.passed), len(result.adapter.passed)) == (64, 64)
    assert any("--set task.eval_prompts=256" in line for line in listener.lines)
    [event] = [e for e in read_jsonl(result.folder / "events.jsonl") if e["kind"] == "evaluations"]
    assert (event["prompts"], event["of"]) == (64, 256)
    assert json.loads((result.folder / "eval.json").read_text())["n"] == 64
    again = train(
        RunConfig.of_run(result.folder / "config.toml", {"run.out": str(result.folder)}),
        resume=True, progress=Listener(),
    )  # fmt: skip
    assert len(again.adapter.passed) == 64


def test_a_number_that_was_set_is_kept_however_slow(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "LARGE", 0)
    monkeypatch.setattr(evaluating, "affordable", lambda count, seconds: pytest.fail("timed"))
    settings = {"model.path": str(tiny_folder), "run.out": str(tmp_path / "run"), **SMALL}
    listener = Listener()
    result = train(RunConfig.create(settings | {"task.eval_prompts": 80}), progress=listener)
    assert len(result.base.passed) == 80
    assert listener.expected > 0


def test_judging_in_two_parts_changes_no_answer(tiny_folder, tmp_path, monkeypatch):
    def base(name):
        settings = {"model.path": str(tiny_folder), "run.out": str(tmp_path / name), **SMALL}
        return train(RunConfig.create(settings | {"run.steps": 0}), progress=False).base

    whole = base("whole")
    monkeypatch.setattr(evaluating, "LARGE", 0)
    assert base("parts") == whole
