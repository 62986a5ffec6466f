"""The bench resumes, pairs what may be paired, and its page says what the results say."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner

from localrl.config import RunConfig
from localrl.errors import ConfigError, DataError, LocalRLError
from localrl.runs.logs import JsonLines
from localrl.tasks.builtin import load_task
from localrl.training import setup

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import learning_results
import learning_runs
import outsider
import tokens_to_learn
import tokens_to_learn_page
from distillation import RULES
from learning_arms import ARMS, BASES, CHOICES, EMBEDDED, LONG, OURS, REMOVED, SMOLLM2, SUBJECTS
from learning_results import (
    Cost,
    bootstrap,
    cost,
    missing,
    paired,
    pairs_of,
    rate,
    ratio,
    reach,
    read,
    results,
    rising,
    timed,
    tuning,
)
from learning_runs import Job, add_costs, identity, make, with_answers, with_paths
from outsider import described
from taught import TAUGHT
from tokens_to_learn import Bench, planned, turns
from tokens_to_learn_page import (
    BEGIN,
    END,
    average,
    collect,
    insert,
    shown,
    together,
    verdict,
    write,
)
from tokens_to_learn_picture import COLORS

RATE = EMBEDDED.rates[0]
NOON = 1_800_000_000.0


def job(arm: str = "flat-8", seed: int = 0, task: str = "steps", lr: float = RATE) -> Job:
    return Job.of(EMBEDDED, task, arm, lr, seed)


def finished(job: Job, *points: tuple[float, float], started: float = NOON, load: float = 0.5):
    """A run with evaluations at thousands of tokens, a second for each thousand."""
    evaluations = [
        {
            "step": n,
            "tokens": 1000 * thousands,
            "wall_s": thousands,
            "cpu_s": thousands,
            "pass@1": accuracy,
            **dict.fromkeys(("rollouts", "trained_tokens", "prefill_positions"), 10 * n),
        }
        for n, (thousands, accuracy) in enumerate(points)
    ]
    where = {"machine": "one", "started": started, "load": load}
    return {**job.record, "where": where, "ended": "budget", "evaluations": evaluations}


def known(*runs: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in runs:
        found.setdefault(identity(run), []).append(run)
    return found


def store(path: Path, *runs: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(JsonLines(path)) as lines:
        for run in runs:
            lines.append(run)


# Arms


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))
@pytest.mark.parametrize("arm", [name for name in ARMS if name not in REMOVED])
def test_the_settings_of_every_arm_exist(subject, arm):
    for task in subject.tasks:
        settings = Job.of(subject, task, arm, 6e-4, 3).settings
        config = RunConfig.create(with_paths(settings))
        assert config.learning.lr == 6e-4
        assert config.run.seed == 3
    assert "," not in arm


@pytest.mark.parametrize("arm", REMOVED)
def test_a_removed_arm_is_refused_and_its_results_are_found(arm):
    run = Job.of(EMBEDDED, "steps", arm, 1e-3, 0)
    with pytest.raises(ConfigError, match=r"removed|must be flat|Unknown setting"):
        RunConfig.create(with_paths(run.settings))
    said = CliRunner().invoke(
        tokens_to_learn.main, ["run", "--subject", "embedded", "--arms", f"pairs,{arm}"]
    )
    assert f"{arm} was removed" in said.output
    assert shown(arm).replace("*", "") == f"{arm} (removed)"


def test_arms_differ_and_the_named_ones_exist():
    records = [json.dumps({**job(arm).record, "arm": ""}, sort_keys=True) for arm in ARMS]
    same = [arm for arm in ARMS if records.count(records[list(ARMS).index(arm)]) > 1]
    assert set(same) <= {"flat-8", "TRL"}  # TRL's step has that shape
    assert {*COLORS, *BASES, *SMOLLM2.arms, *EMBEDDED.arms, *CHOICES.arms} <= set(ARMS)
    assert set(OURS) <= set(EMBEDDED.arms)
    biased = {"pruning", "prefixes", "options", "options in log text", TAUGHT, *RULES}
    there = [arm for arm in ARMS.values() if not arm.removed]
    assert all(arm.biased == bool(biased & {*(arm.rival or "").split(" + ")}) for arm in there)


def test_worked_examples_are_the_answers_of_the_training_prompts(tmp_path):
    settings = Job.of(SMOLLM2, "three facts", "worked examples", 3e-4, 0).settings
    path = Path(with_answers(settings, tmp_path)["task.demonstrations"])
    task = load_task("extraction:2", train_prompts=settings["task.train_prompts"])
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    examples = [task.train(n) for n in range(task.train_size)]
    assert [row[-1]["content"] for row in rows] == [example.answer for example in examples]
    assert [tuple(row[:-1]) for row in rows] == [example.messages for example in examples]
    held_out = [example.messages for example in task.evaluation(SMOLLM2.prompts)]
    assert not any(tuple(row[:-1]) in held_out for row in rows)


def test_results_name_no_folder_of_this_machine():
    record = Job.of(SMOLLM2, "facts", "pairs", 3e-4, 0).record
    assert str(learning_runs.ROOT) not in json.dumps(record)
    rewards = with_paths(record["settings"])["task.rewards"]
    assert all(Path(each.partition(".py:")[0] + ".py").exists() for each in rewards)


def test_the_long_task_asks_for_ten_facts_and_begins_the_answer():
    told = described(Job.of(LONG, "ten facts", "pairs", 3e-4, 0))
    assert [len(told["train"]), len(told["held_out"])] == [64, LONG.prompts]
    asked, begun = told["train"][0]["prompt"]
    facts = json.loads(told["train"][0]["answer"])
    assert len(facts) == 10
    assert all(f'"{key}"' in asked["content"] for key in facts)
    assert all(str(value) in asked["content"] for value in facts.values())
    assert json.dumps(facts, indent=2).startswith(begun["content"])


def test_a_task_may_be_judged_by_its_mean_reward():
    one = Job.of(LONG, "ten facts", "pairs", 3e-4, 0)
    made = finished(one, (0, 0.0), (10, 0.0), (20, 0.1))
    for each, reward in zip(made["evaluations"], (0.2, 0.4, 0.6), strict=True):
        each["mean_reward"] = reward
    assert cost(made, 0.5) == Cost(pytest.approx(15_000))
    assert not learning_runs.learned(made["evaluations"], LONG.tasks["ten facts"])
    for each in made["evaluations"][1:]:
        each["mean_reward"] = LONG.tasks["ten facts"].stop + 0.01
    assert learning_runs.learned(made["evaluations"], LONG.tasks["ten facts"])


# Costs


def test_the_rising_fit_pools_what_is_out_of_order():
    assert rising(np.array([0.1, 0.3, 0.2, 0.4])).tolist() == pytest.approx([0.1, 0.25, 0.25, 0.4])
    assert rising(np.array([3.0, 2.0, 1.0])).tolist() == [2.0] * 3
    draws = np.random.default_rng(0).normal(size=50).cumsum()
    fit = rising(draws)
    assert (np.diff(fit) >= 0).all()
    assert fit.mean() == pytest.approx(draws.mean())


def test_the_crossing_of_the_fit_is_interpolated():
    spent = np.array([0.0, 20.0, 40.0, 60.0])
    assert reach((spent, np.array([0.2, 0.4, 0.6, 0.8])), 0.7) == pytest.approx(50)
    assert reach((spent, np.array([0.2, 0.9, 0.3, 0.8])), 0.7) == pytest.approx(50)  # not the peak
    assert reach((spent, np.array([0.2, 0.9, 0.8, 0.1])), 0.7) is None  # it collapsed
    assert reach((spent, np.array([0.8, 0.8, 0.9, 0.9])), 0.7) == 0


def test_a_run_that_does_not_get_there_counts_as_all_it_spent():
    reached = finished(job(), (0, 0.3), (10, 0.8), (12, 0.9))
    assert cost(reached, 0.85) == Cost(pytest.approx(11_000))
    assert cost(reached, 0.85, "wall_s") == Cost(pytest.approx(11))
    never = finished(job(), (0, 0.3), (9, 0.8))  # it diverged before the budget
    assert cost(never, 0.85) == Cost(EMBEDDED.budget, bound=True)
    assert cost(never, 0.85, "wall_s") == Cost(9, bound=True)
    assert cost(never | {"ended": "time"}, 0.85) == Cost(9000, bound=True)
    assert average([cost(reached, 0.85), cost(never, 0.85)], 1000) == "≥ 26"
    assert average([]) == "-"


# Pairs


def test_the_bootstrap_interval_is_the_same_every_time_and_holds_the_truth():
    rng = np.random.default_rng(1)
    draws = [bootstrap(list(rng.normal(2.0, 1.0, size=30))) for _ in range(20)]
    assert sum(low < 2.0 < high for _, low, high in draws) >= 17
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])
    mean, low, high = bootstrap([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert 1.0 <= low < mean < high <= 4.0


def test_ratios_are_geometric_means_and_say_when_they_are_bounds():
    assert ratio([]) is None
    assert ratio([(Cost(0.0), Cost(0.0))]) is None  # at the goal from the start
    two = ratio([(Cost(50.0), Cost(100.0)), (Cost(800.0), Cost(400.0))])
    assert str(two) == "1.00 (0.50 to 2.00)"
    assert two.pairs == 2
    for above, below, mark in ((True, False, "≥"), (False, True, "≤"), (True, True, "≷")):
        assert str(ratio([(Cost(50.0, above), Cost(100.0, below))])) == f"{mark} 0.50"


def test_seconds_are_paired_within_an_hour_on_one_quiet_machine():
    base = finished(job(), (0, 0.3), (9, 0.9))
    near = finished(job("pairs"), (0, 0.3), (9, 0.9), started=NOON + 3000)
    late = finished(job("pairs"), (0, 0.3), (9, 0.9), started=NOON + 3700)
    loud = finished(job("pairs"), (0, 0.3), (9, 0.9), load=1.6)
    waited = finished(job("pairs"), (0, 0.3), (9, 0.9))
    waited["where"]["waited"] = 0.06
    served = finished(job("pairs"), (0, 0.3), (9, 0.9), load=9.0)
    served["where"]["waited"] = 0.04
    other = near | {"where": near["where"] | {"machine": "another"}}
    assert [paired(run, base) for run in (near, late, other)] == [True, False, False]
    alone, two = (replace(SMOLLM2, seconds="wall_s", at_once=count) for count in (1, 2))
    assert [timed(loud, subject) for subject in (alone, two, EMBEDDED)] == [False, True, True]
    assert [timed(run, alone) for run in (waited, served)] == [False, True]

    def quiet(run: dict) -> bool:
        return timed(run, alone)

    assert pairs_of({0: [late, near]}, {0: [base]}, quiet) == [(near, base)]
    assert pairs_of({0: [late]}, {0: [base]}, quiet) == []
    assert pairs_of({0: [loud]}, {0: [base]}, quiet) == []
    assert pairs_of({0: [loud], 1: [near]}, {0: [base]}, None) == [(loud, base)]


# Rates and resuming


def tuned(arm: str, ends: dict[float, float], spent: float = 20) -> list[dict]:
    """Tuning runs that reach these pass@1."""
    return [finished(j, (0, 0.3), (spent, ends[j.lr])) for j in tuning(EMBEDDED, arm)]


def test_the_rate_with_the_fewest_tokens_is_chosen_once_all_runs_are_there():
    low, middle, high = EMBEDDED.rates
    runs = [
        finished(j, (0, 0.3), ({low: 30, middle: 20, high: 5}[j.lr], 0.9))
        if (j.lr, j.seed) != (high, 101)
        else finished(j, (0, 0.3), (5, 0.9), (9, 0.1))  # the highest rate collapses once
        for j in tuning(EMBEDDED, "pairs")
    ]
    assert rate(EMBEDDED, "pairs", known(*runs[:-1])) is None
    assert rate(EMBEDDED, "pairs", known(*runs)) == middle
    never = tuned("flat-8", {low: 0.4, middle: 0.5, high: 0.7})
    assert rate(EMBEDDED, "flat-8", known(*never)) == high  # none gets there: the best


def test_a_single_rate_needs_no_tuning_and_an_arm_may_take_anothers():
    one = replace(EMBEDDED, rates=(1e-3,))
    assert tuning(one, "pairs") == []
    assert rate(one, "pairs", {}) == 1e-3
    runs = known(*tuned("flat-8", dict(zip(EMBEDDED.rates, (0.4, 0.9, 0.5), strict=True))))
    assert tuning(EMBEDDED, "TRL") == []
    assert rate(EMBEDDED, "TRL", runs) == EMBEDDED.rates[1]


def test_arms_of_a_seed_run_in_turn():
    one = replace(EMBEDDED, rates=(RATE,))
    jobs = turns(one, ["flat-8", "pairs"], [0, 1], {})
    assert [(j.task, j.seed, j.arm) for j in jobs[:4]] == [
        ("steps", 0, "flat-8"),
        ("steps", 0, "pairs"),
        ("steps", 1, "flat-8"),
        ("steps", 1, "pairs"),
    ]
    with pytest.raises(click.ClickException, match="add --tune"):
        turns(EMBEDDED, ["pairs"], [0], {})


def test_runs_that_are_there_are_not_made_again_unless_their_arm_has_changed(monkeypatch):
    jobs = [job(seed=seed) for seed in range(3)]
    there = known(finished(jobs[1], (0, 0.3)))
    assert missing(jobs, there) == [jobs[0], jobs[2]]
    monkeypatch.setitem(ARMS, "flat-8", replace(ARMS["flat-8"], settings={"lora.rank": 4}))
    assert missing(jobs, there) == jobs


def test_the_base_runs_again_before_an_arm_that_would_have_no_partner(monkeypatch):
    monkeypatch.setattr(tokens_to_learn, "machine", lambda: "one")
    base, pairs, single = job(), job("pairs"), job("single")
    jobs = [base, pairs, single]
    old = finished(base, (0, 0.3), started=time.time() - 3500)

    def left(jobs: list[Job], *runs: dict) -> list[Job]:
        return list(planned(jobs, lambda: known(*runs), BASES[0]))

    assert left(jobs) == jobs
    assert left(jobs, old) == [base, pairs, single]
    assert list(planned(jobs, lambda: known(old))) == [pairs, single]  # nothing is paired
    new = finished(base, (0, 0.3), started=time.time() - 600)
    assert left(jobs, new) == [pairs, single]
    monkeypatch.setattr(tokens_to_learn, "timed", lambda run, _: run["where"]["load"] < 1)
    loud = finished(base, (0, 0.3), started=time.time() - 600, load=9.0)
    assert left(jobs, loud) == [base, pairs, single]
    assert left(jobs[:1], old) == []
    assert left([pairs]) == [pairs]  # without the base there is no partner


def bench(tmp_path: Path, busy: str = "refuse") -> Bench:
    return Bench(replace(EMBEDDED, at_once=1), tmp_path, busy, None)


def test_only_missing_runs_are_started_and_a_failure_is_told(tmp_path, monkeypatch):
    jobs = [job(seed=seed) for seed in range(4)]
    store(results(EMBEDDED, tmp_path), finished(jobs[0], (0, 0.3)))
    started: list[Job] = []
    monkeypatch.setattr(tokens_to_learn, "start", lambda _, j: started.append(j) or j.seed != 2)
    monkeypatch.setattr(tokens_to_learn, "await_quiet", lambda *_: None)
    with pytest.raises(click.ClickException, match="1 runs failed"):
        tokens_to_learn.schedule(bench(tmp_path), jobs)
    assert started == jobs[1:]


def test_a_busy_machine_is_refused_or_noted(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(tokens_to_learn.os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    monkeypatch.setattr(tokens_to_learn.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(tokens_to_learn.time, "sleep", lambda _: None)
    with pytest.raises(click.ClickException, match=r"load has been above 1\.5"):
        tokens_to_learn.await_quiet("refuse", 1)
    tokens_to_learn.await_quiet("mark", 1)
    assert "will not be compared" in capsys.readouterr().out
    tokens_to_learn.await_quiet("refuse", 2)  # one of the two is our own


def test_unknown_arms_and_tasks_are_named(tmp_path):
    runner = CliRunner()
    out = ["--out", str(tmp_path)]
    said = runner.invoke(tokens_to_learn.main, [*out, "run", "--subject", "smollm2", "--arms", "x"])
    assert "There is no arm 'x'" in said.output
    said = runner.invoke(
        tokens_to_learn.main, [*out, "run", "--subject", "smollm2", "--arms", "TRL"]
    )
    assert "add --python" in said.output
    arguments = [
        "--subject",
        "embedded",
        "--task",
        "x",
        "--arm",
        "pairs",
        "--lr",
        "1",
        "--seed",
        "0",
    ]
    assert (
        "the tasks steps, sorting"
        in runner.invoke(tokens_to_learn.main, [*out, "one", *arguments]).output
    )
    said = runner.invoke(tokens_to_learn.main, [*out, "status"])
    assert "pairs" in said.output
    assert said.exit_code == 0


# One run


class FakeSession:
    """Each step makes 50 tokens; the evaluations come from a list."""

    def __init__(self, accuracies: list[float]) -> None:
        self.tokens = 0
        self.sampler = None
        self._accuracies = iter(accuracies)

    def evaluate(self, step: int) -> SimpleNamespace:
        return SimpleNamespace(
            pass_at_1=next(self._accuracies), mean_reward=0.5, mean_completion_tokens=9.0
        )


def learned(monkeypatch, accuracies: list[float], error: Exception | None = None):
    """What `learn` makes of a session with these evaluations, 120 tokens apart, of 400 in all."""

    def train_step(session: FakeSession, step: int) -> None:
        if error and step == 4:
            raise error
        session.tokens += 50

    import_module("localrl.train")

    def open_session(*given, **named):
        opened.bind(*given, **named)  # as a real run is opened
        return nullcontext(FakeSession(accuracies))

    opened = signature(setup.open_session)
    monkeypatch.setattr(setup, "open_session", open_session)
    # By its module: the package's attribute of that name is the function `train`.
    monkeypatch.setattr(sys.modules["localrl.train"], "train_step", train_step)
    short = replace(job(), budget=400, every=120)
    return learning_runs.learn(short, Path("unused"))


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


def test_a_run_of_the_embedded_model_ends_up_in_the_results(tmp_path):
    """DAPO's, since it discards rollouts, which count."""
    sizes = ["--tokens", "300", "--every", "200", "--prompts", "4", "--out", str(tmp_path)]
    arguments = ["--subject", "embedded", "--task", "steps", "--arm", "DAPO", "--lr", "1e-3"]
    said = CliRunner().invoke(
        tokens_to_learn.main, [*sizes, "one", *arguments, "--seed", "0"], catch_exceptions=False
    )
    assert said.exit_code == 0
    small = replace(EMBEDDED, budget=300, every=200, prompts=4)
    made = read(results(EMBEDDED, tmp_path))
    [run] = made[identity(Job.of(small, "steps", "DAPO", 1e-3, 0).record)]
    last = run["evaluations"][-1]
    assert last["tokens"] >= 300
    assert last["rollouts"] >= 32
    assert last["wall_s"] > 0
    assert run["where"]["load"] >= 0
    if Path("/proc/self/schedstat").exists():
        assert 0 <= run["where"]["waited"] < 8
    assert run["where"]["machine"]
    assert "discarded" not in last


def test_costs_are_summed_up_to_each_evaluation(tmp_path):
    with closing(JsonLines(tmp_path / "metrics.jsonl")) as lines:
        lines.append({"step": 1, "update/trained_tokens": 5, "rollout/prefill_positions": 2})
        lines.append({"step": 1, "eval/pass@1": 0.5})
        lines.append({"step": 2, "update/trained_tokens": 7, "rollout/prefill_positions": 2})
    with closing(JsonLines(tmp_path / "rollouts.jsonl")) as lines:
        for step in (1, 1, 2):
            lines.append({"step": step, "leaves": [{}, {}, {}]})
    evaluations = [{"step": step, "discarded": 100 * step} for step in (0, 1, 2)]
    add_costs(evaluations, tmp_path)
    assert [each["trained_tokens"] for each in evaluations] == [0, 5, 12]
    assert [each["prefill_positions"] for each in evaluations] == [0, 2, 4]
    assert [each["rollouts"] for each in evaluations] == [0, 106, 209]
    assert evaluations[2]["forward_calls"] is None


# TRL


def test_the_outsider_gets_the_same_prompts_rewards_and_adapters():
    told = described(Job.of(replace(SMOLLM2, prompts=6), "facts", "TRL", 3e-4, 1))
    assert [len(told["train"]), len(told["held_out"])] == [64, 6]
    first = told["train"][0]
    assert first["prompt"][-1]["role"] == "user"
    assert {"name", "city"} <= set(json.loads(json.loads(first["answer"])))
    [(target, weight)] = told["rewards"]
    assert target.endswith("examples/smollm2/rewards.py:facts")
    assert weight == 1
    assert [told[name] for name in ("prompts", "group", "rank", "scale")] == [4, 8, 16, 2.0]
    assert json.dumps(told)
    with pytest.raises(LocalRLError, match="--python"):
        make(Job.of(SMOLLM2, "facts", "TRL", 3e-4, 1))


def test_a_failure_of_the_outsider_is_told(monkeypatch):
    monkeypatch.setattr(outsider, "make_dense", lambda *_: None)
    with pytest.raises(LocalRLError, match="TRL ended with code"):
        make(Job.of(replace(SMOLLM2, prompts=2), "facts", "TRL", 3e-4, 1), python=sys.executable)


def test_the_outsiders_runner_scores_as_localrl_does_and_knows_when_to_end():
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))
    from learn_trl import Course, scored

    told = described(Job.of(replace(SMOLLM2, prompts=2), "facts", "TRL", 3e-4, 1))
    answers = [json.loads(row["answer"]) for row in told["held_out"]]
    texts = [answers[0], "no JSON"]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    assert scored(told["rewards"], said, told["held_out"]) == [1.0, 0.0]
    course = Course({"every": 100, "budget": 300, "stop": 0.5, "limit_s": 60})
    course.add(0, 0.2, 9.0)
    course.tokens = 90
    assert not course.due()
    course.tokens = 120
    assert course.due()
    course.add(1, 0.6, 9.0)
    assert not course.over()
    course.tokens = 230
    course.add(2, 0.6, 9.0)
    assert course.over()
    assert course.ended == "learned"
    course.evaluations[-1]["pass@1"] = 0.4
    course.tokens = 301
    assert course.over()
    assert course.ended == "budget"


# The page


def synthetic() -> dict[str, dict[str, list[dict]]]:
    """Runs of three arms: pairs needs half of flat-8's tokens, CPPO twice as many."""
    needs = {"flat-8": 20.0, "flat-8 in small steps": 16.0, "pairs": 10.0, "CPPO": 40.0}
    runs = []
    for arm, tokens in needs.items():
        for subject in (EMBEDDED, SMOLLM2):
            goal = next(iter(subject.tasks.values())).goal
            runs += [finished(j, (0, 0.2), (tokens, goal)) for j in tuning(subject, arm)]
            for task, aim in subject.tasks.items():
                for seed in (0, 1):
                    one = Job.of(subject, task, arm, subject.rates[0], seed)
                    late = NOON + (4000 if (arm, seed) == ("pairs", 1) else 60 * seed)
                    ends = [(0, 0.2), (tokens + seed, aim.goal), (tokens + 5, 0.95)]
                    runs.append(finished(one, *ends, started=late))
    found = known(*runs)
    return {
        name: {key: some for key, some in found.items() if some[0]["subject"] == name}
        for name in SUBJECTS
    }


def test_two_seeds_make_no_arm_better():
    parts = [part for name in SUBJECTS for part in collect(SUBJECTS[name], synthetic()[name])]
    assert parts
    assert "- none" in verdict(parts)


def test_the_seeds_of_all_tasks_are_taken_together(monkeypatch):
    parts = list(collect(SMOLLM2, synthetic()["smollm2"]))
    assert len(parts) == 2
    assert together(parts) == []  # two seeds are too few
    monkeypatch.setattr(tokens_to_learn_page, "SEEDS", 2)
    assert together(parts[:1]) == []
    rows = together(parts)[-1].splitlines()
    pairs = next(line for line in rows if line.startswith("| pairs |"))
    one = parts[0].against("pairs", "flat-8", "tokens")
    assert one is not None
    assert pairs.startswith(f"| pairs | {one.mean:.2f} (")  # both tasks have the same ratios
    assert pairs.endswith("0.50 (0.50 to 0.50), 2 pairs |")  # seconds of one seed of each task
    assert not any(line.startswith("| flat-8 |") for line in rows)


def test_the_page_says_what_the_results_say(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(learning_results, "SEEDS", 2)
    page = tmp_path / "strategies.md"
    page.write_text(f"# Mine\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n")
    write(synthetic(), tmp_path)
    text = page.read_text()
    assert text.startswith("# Mine\n\nbefore\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| pairs | 0.0003 | 2 | 10 | 0.51 (0.50 to 0.52) | 10 | 0.50, 1 pair |" in text
    assert (
        f"From 0.20 to {SMOLLM2.tasks['facts'].goal:g}, the fewest tokens are those of pairs: 0.51"
        in text
    )
    text = (tmp_path / "strategies-tables.md").read_text()
    part = text.partition("### `facts` with SmolLM2-135M-Instruct")[2]
    row = next(line for line in part.splitlines() if line.startswith("| pairs |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["pairs", f"{SMOLLM2.rates[0]:g}", "2", "10"]
    assert cells[4].startswith("0.51 (0.50 to 0.52)")
    assert cells[7] == "10"
    assert cells[8] == "0.50, 1 pair"  # the second seed's partner ran over an hour earlier
    assert "| *CPPO* |" in part
    assert "- pairs: tokens on `facts`" in text
    assert "Not better on any task: *CPPO*." in text
    assert (tmp_path / "strategies.png").stat().st_size > 10_000
    assert text.index("`facts`") < text.index("`steps`")
    assert "| *CPPO* | arXiv 2503.22342, pruning | `learning.objective=grpo` |" in text


def test_runs_of_other_sizes_and_rates_are_not_on_the_page():
    runs = synthetic()["embedded"]
    parts = {part.task: part for part in collect(EMBEDDED, runs)}
    assert set(parts) == {"steps", "sorting"}
    assert set(parts["steps"].arms["pairs"]) == {0, 1}
    assert list(collect(replace(EMBEDDED, budget=1), runs)) == []


def test_without_results_the_page_stays(tmp_path):
    page = tmp_path / "strategies.md"
    page.write_text("as it was")
    with pytest.raises(click.ClickException, match="no results yet"):
        write({}, tmp_path)
    assert page.read_text() == "as it was"


def test_the_page_keeps_what_stands_around_the_results(tmp_path):
    page = tmp_path / "strategies.md"
    insert(["new"], page)
    insert(["newer", "newest"], page)
    assert page.read_text() == f"# Strategies\n\n{BEGIN}\n\nnewer\n\nnewest\n\n{END}\n"
    page.write_text("no markers\n")
    with pytest.raises(click.ClickException, match="lacks"):
        insert(["new"], page)
    assert page.read_text() == "no markers\n"


def test_small_costs_have_a_decimal():
    assert average([Cost(1234.4), Cost(1233.6)]) == "1,234"
    assert average([Cost(2.34)]) == "2.3"
