from __future__ import annotations

import json
import math
import sys
from contextlib import closing, nullcontext
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest

from localrl.config import RunConfig
from localrl.errors import DataError, LocalRLError
from localrl.runs.logs import JsonLines
from localrl.training import setup

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import strategies
from strategies import (
    ARMS,
    BEGIN,
    COLORS,
    END,
    LEARNING_RATES,
    TUNING_SEEDS,
    Bench,
    Cost,
    Job,
    add_costs,
    average,
    bootstrap,
    cost,
    insert,
    missing,
    rates,
    ratio,
    reach,
    tuning,
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "out", tmp_path, None, 20_000, 256)


def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations at thousands of tokens, one second for each thousand."""
    return [
        {"tokens": 1000 * thousands, "wall_s": thousands, "cpu_s": thousands, "pass@1": accuracy}
        for thousands, accuracy in pairs
    ]


def finished(job: Job, *pairs: tuple[float, float]) -> dict:
    return {**job.record, "ended": "budget", "evaluations": points(*pairs)}


def store(bench: Bench, *runs: dict) -> None:
    bench.out.mkdir(exist_ok=True)
    with closing(JsonLines(bench.file)) as lines:
        for run in runs:
            lines.append(run)


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_settings_exist(bench, arm):
    job = bench.job("steps", arm, 6e-4, 3)
    config = RunConfig.create(job.settings)
    assert config.learning.lr == 6e-4
    assert config.run.seed == 3
    assert "," not in arm
    assert set(COLORS) <= set(ARMS)


def test_arms_differ(bench):
    settings = [json.dumps(bench.job("steps", arm, 1.0, 0).settings) for arm in ARMS]
    assert len(set(settings)) == len(ARMS)


def test_the_crossing_after_which_it_stays_above_is_interpolated():
    curve = np.array([0.0, 20.0, 40.0, 60.0, 80.0]), np.array([0.3, 0.8, 0.9, 0.7, 0.8])
    assert reach(curve, 0.75) == pytest.approx(70)  # half way from 0.7 to 0.8
    assert reach(curve, 0.85) is None  # a peak
    assert reach((curve[0][:3], curve[1][:3]), 0.85) == pytest.approx(30)
    assert reach(curve, 0.3) == 0
    assert reach(curve, 0.95) is None


def test_a_run_that_does_not_get_there_counts_as_its_budget(bench):
    job = bench.job("steps", "flat", 6e-4, 0)
    reached = finished(job, (0, 0.3), (100, 0.8), (120, 0.9))
    assert cost(reached) == Cost(pytest.approx(110_000))
    assert cost(reached, "wall_s") == Cost(pytest.approx(110))
    never = finished(job, (0, 0.3), (401, 0.8))
    assert cost(never) == Cost(job.budget, bound=True)
    assert cost(never, "wall_s") == Cost(401, bound=True)
    mean = (110 + job.budget / 1000) / 2
    assert average({0: cost(reached), 1: cost(never)}, 1000) == f"≥ {mean:,.0f}"
    assert average({0: cost(reached)}, 1000) == "110"


def test_the_bootstrap_interval_is_the_same_every_time_and_holds_the_truth():
    rng = np.random.default_rng(1)
    draws = [bootstrap(list(rng.normal(2.0, 1.0, size=30))) for _ in range(20)]
    assert sum(low < 2.0 < high for _, low, high in draws) >= 17
    values = [1.0, 2.0, 4.0]
    assert bootstrap(values) == bootstrap(values)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(7 / 3)
    assert 1.0 <= low < mean < high <= 4.0


def test_ratios_are_paired_over_the_seeds_that_both_have():
    flat = {0: Cost(100.0), 1: Cost(400.0), 2: Cost(7.0)}
    arm = {0: Cost(50.0), 1: Cost(200.0), 5: Cost(1e9)}
    assert ratio(arm, flat) == "0.50 (0.50 to 0.50)"
    mixed = {0: Cost(50.0), 1: Cost(800.0)}  # 1/2 and 2: their geometric mean is 1
    assert ratio(mixed, flat) == "1.00 (0.50 to 2.00)"
    assert ratio({0: Cost(25.0)}, flat) == "0.25"
    assert ratio({9: Cost(25.0)}, flat) == "-"


@pytest.mark.parametrize(
    ("arm", "flat", "mark"), [(True, False, "≥"), (False, True, "≤"), (True, True, "≷")]
)
def test_ratios_say_when_they_are_bounds(arm, flat, mark):
    assert ratio({0: Cost(50.0, arm)}, {0: Cost(100.0, flat)}) == f"{mark} 0.50"


def test_a_cost_that_was_not_measured_is_left_open():
    assert average({0: Cost(math.nan), 1: Cost(1.0)}) == "-"


def test_runs_that_are_there_are_not_made_again(bench, monkeypatch):
    jobs = [bench.job("steps", "flat", 6e-4, seed) for seed in range(3)]
    assert missing(jobs, bench.known()) == jobs
    store(bench, finished(jobs[1], (0, 0.3)))
    assert missing(jobs, bench.known()) == [jobs[0], jobs[2]]
    monkeypatch.setitem(ARMS, "flat", strategies.Arm({"rollout.group_size": 4}))
    assert missing(jobs, bench.known()) == jobs  # made with other settings


def test_only_missing_runs_are_started_and_a_failure_is_told(bench, monkeypatch):
    jobs = [bench.job("steps", "flat", 6e-4, seed) for seed in range(4)]
    store(bench, finished(jobs[0], (0, 0.3)))
    started = []
    monkeypatch.setattr(strategies, "start", lambda bench, job: started.append(job) or True)
    strategies.schedule(bench, jobs, 1)
    assert started == jobs[1:]
    monkeypatch.setattr(strategies, "start", lambda bench, job: job.seed != 2)
    with pytest.raises(click.ClickException, match="1 runs failed"):
        strategies.schedule(bench, jobs, 1)


def test_arms_take_turns(bench):
    assert [(job.lr, job.arm) for job in tuning(bench, ["flat", "adaptive"])][:3] == [
        (LEARNING_RATES[0], "flat"),
        (LEARNING_RATES[0], "adaptive"),
        (LEARNING_RATES[1], "flat"),
    ]


def test_the_rate_with_the_fewest_tokens_over_the_tuning_seeds_is_chosen(bench):
    jobs = tuning(bench, ["flat"])
    assert [job.seed for job in jobs] == [seed for seed in TUNING_SEEDS for _ in LEARNING_RATES]
    # The highest rate is lucky with the first seed and collapses with the second.
    ends = [[(30, 0.9)], [(20, 0.9)], [(5, 0.9)], [(30, 0.9)], [(20, 0.9)], [(5, 0.9), (9, 0.1)]]
    for n, (job, points) in enumerate(zip(jobs, ends, strict=True)):
        assert rates(bench, bench.known()) == {}, n  # some are still to be made
        store(bench, finished(job, (0, 0.3), *points))
    assert rates(bench, bench.known()) == {"flat": LEARNING_RATES[1]}


def test_of_rates_that_never_get_there_the_best_is_chosen(bench):
    ends = zip(tuning(bench, ["flat"]), (0.4, 0.5, 0.7) * 2, strict=True)
    store(bench, *(finished(job, (0, 0.3), (40, end)) for job, end in ends))
    assert rates(bench, bench.known()) == {"flat": LEARNING_RATES[2]}


class FakeSession:
    """Each step makes 50 tokens; the evaluations come from a list."""

    def __init__(self, accuracies: list[float]) -> None:
        self.tokens = 0
        self._accuracies = iter(accuracies)

    def evaluate(self, step: int) -> SimpleNamespace:
        return SimpleNamespace(pass_at_1=next(self._accuracies), mean_completion_tokens=9.0)


def learned(monkeypatch, accuracies: list[float], error: Exception | None = None):
    """What `learn` makes of a session with these evaluations, 120 tokens apart, of 400 in all."""

    def train_step(session: FakeSession, step: int) -> None:
        if error and step == 4:
            raise error
        session.tokens += 50

    def open_session(*given, **named):
        signature(setup.open_session).bind(*given, **named)  # as a real run is opened
        return nullcontext(FakeSession(accuracies))

    fakes = {
        "localrl.training.setup": SimpleNamespace(open_session=open_session),
        "localrl.training.session": SimpleNamespace(NullProgress=object),
        "localrl.train": SimpleNamespace(train_step=train_step),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return strategies.learn(Job("steps", "flat", 1e-3, 0, 400, 120, 16), Path("unused"))


def test_evaluations_come_with_the_tokens_and_at_the_budget(monkeypatch):
    evaluations, ended = learned(monkeypatch, [0.3, 0.95, 0.5, 0.6, 0.7])
    assert [each["tokens"] for each in evaluations] == [0, 150, 250, 400]
    assert [each["step"] for each in evaluations] == [0, 3, 5, 8]
    assert [each["pass@1"] for each in evaluations] == [0.3, 0.95, 0.5, 0.6]
    assert ended == "budget"


def test_two_evaluations_above_the_stop_mark_end_a_run(monkeypatch):
    evaluations, ended = learned(monkeypatch, [0.3, 0.95, 0.91])
    assert evaluations[-1]["tokens"] == 250
    assert ended == "learned"


def test_only_divergence_is_a_result(monkeypatch):
    evaluations, ended = learned(monkeypatch, [0.3, 0.4], LocalRLError("has diverged"))
    assert [each["tokens"] for each in evaluations] == [0, 150]
    assert ended == "has diverged"
    with pytest.raises(DataError):
        learned(monkeypatch, [0.3, 0.4], DataError("is broken"))


def test_costs_are_summed_up_to_each_evaluation(tmp_path):
    with closing(JsonLines(tmp_path / "metrics.jsonl")) as lines:
        lines.append({"step": 1, "update/trained_tokens": 5, "rollout/prefill_positions": 2})
        lines.append({"step": 1, "eval/pass@1": 0.5})
        lines.append({"step": 2, "update/trained_tokens": 7, "rollout/prefill_positions": 2})
    with closing(JsonLines(tmp_path / "rollouts.jsonl")) as lines:
        for step in (1, 1, 2):
            lines.append({"step": step, "leaves": [{}, {}, {}]})
    evaluations = [{"step": step} for step in (0, 1, 2)]
    add_costs(evaluations, tmp_path)
    assert [each["trained_tokens"] for each in evaluations] == [0, 5, 12]
    assert [each["prefill_positions"] for each in evaluations] == [0, 2, 4]
    assert [each["rollouts"] for each in evaluations] == [0, 6, 9]
    assert evaluations[2]["forward_calls"] is None


def test_the_page_keeps_what_stands_around_the_results(tmp_path):
    page = tmp_path / "strategies.md"
    page.write_text(f"# Mine\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n")
    insert("new", page)
    insert("newer", page)
    assert page.read_text() == f"# Mine\n\nbefore\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"


def test_a_missing_page_is_begun_and_one_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "strategies.md"
    insert("new", page)
    assert f"{BEGIN}\n\nnew\n\n{END}" in page.read_text()
    page.write_text("no markers\n")
    with pytest.raises(click.ClickException, match="lacks"):
        insert("new", page)
    assert page.read_text() == "no markers\n"


def test_the_block_compares_with_flat(bench):
    for arm, tokens in (("flat", 20), ("adaptive", 10)):
        tuned = tuning(bench, [arm])
        store(bench, *(finished(job, (0, 0.3), (tokens, 0.85)) for job in tuned))
        runs = [bench.job("steps", arm, LEARNING_RATES[0], seed) for seed in (0, 1)]
        store(bench, *(finished(job, (0, 0.35), (tokens, 0.85)) for job in runs))
    rows = strategies.results(strategies.collect(bench, "steps")).splitlines()
    assert rows[2] == f"| flat | {LEARNING_RATES[0]:g} | 2 | 20 | 1 | - | 20 | 1 | 0.50 |"
    half = "0.50 (0.50 to 0.50)"
    assert rows[3] == (
        f"| adaptive | {LEARNING_RATES[0]:g} | 2 | 10 | {half} | - | 10 | {half} | 0.65 |"
    )
    assert strategies.collect(bench, "sorting") == {}
