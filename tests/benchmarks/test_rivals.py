"""Each rival does what its paper says, and runs in localrl's loop on a tiny model."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from forests import flat_group, scored

from localrl.config import RunConfig
from localrl.learning.credit import Credit, assign_credit
from localrl.processes.heartbeat import Heartbeat
from localrl.records import ScoredGroup
from localrl.train import train_step
from localrl.training.session import NullProgress
from localrl.training.setup import open_session

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import rivals
from rivals import DynamicSampling, Pruning, Skipping, keep_largest, uniform, with_rival


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """An open session on a tiny model, with 12 prompts in steps of 3 groups of 4."""
    folder = tmp_path_factory.mktemp("rivals")
    (folder / "odd.py").write_text(
        "def odd(completion_ids, **columns):\n    return [sum(ids) % 2 for ids in completion_ids]\n"
    )
    config = RunConfig.create(
        {
            "model.path": str(tiny.make_folder(folder / "model")),
            "run.out": str(folder / "run"),
            "task.name": "steps",
            "task.rewards": f"{folder / 'odd.py'}:odd",
            "task.train_prompts": 12,
            "task.eval_prompts": 0,
            "rollout.prompts_per_step": 3,
            "rollout.group_size": 4,
            "rollout.max_prompt_tokens": 64,
            "rollout.max_completion_tokens": 6,
            "learning.objective": "grpo",
            "learning.kappa": 0.0,
        }
    )
    with open_session(
        config, overwrite=False, resume=False, progress=NullProgress(), heartbeat=Heartbeat()
    ) as session:
        yield session


@pytest.fixture
def session(opened):
    """A copy, in which a stage may be replaced."""
    return replace(opened)


def numbered(opened, number: int, rewards) -> ScoredGroup:
    """A group of a training prompt with these rewards."""
    group = flat_group(len(rewards))
    return scored(replace(group, example=opened.task.train(number)), rewards)


def script(sampler, rewards, sizes):
    """Let the groups of every prompt have these rewards; note the batches' sizes."""

    def collected(self, step, examples, version):
        sizes.append(len(examples))
        return [scored(replace(flat_group(4), example=e), rewards(e, len(sizes))) for e in examples]

    return collected


MIXED, RIGHT, WRONG = (1.0, 0.0, 0.0, 1.0), (1.0,) * 4, (0.0,) * 4


def test_without_a_rival_the_session_stays_itself(session):
    assert with_rival(session, None) is session
    assert rivals.discarded(session).tokens == 0


@pytest.mark.parametrize("rival", ["dynamic sampling", "skipping", "pruning"])
def test_a_rival_trains_a_step(session, rival):
    staged = with_rival(session, rival)
    before = staged.tokens, session.updater.updates
    train_step(staged, 1)
    assert staged.tokens > before[0]
    assert session.updater.updates == before[1] + 1
    if rival == "pruning":
        assert isinstance(staged, Pruning)
    else:
        assert isinstance(staged.sampler, DynamicSampling)


# DAPO


def test_dynamic_sampling_goes_on_until_every_group_has_variance(session, monkeypatch):
    sampler = with_rival(session, "dynamic sampling").sampler
    sizes: list[int] = []
    mixed = {sampler.task.train(n).id for n in range(0, 12, 3)}  # one prompt in three
    collected = script(sampler, lambda e, _: MIXED if e.id in mixed else RIGHT, sizes)
    monkeypatch.setattr(rivals.Sampler, "collect", collected)
    groups = sampler.collect(1, sampler.choose(1), 0)
    assert len(groups) == 3
    assert not any(map(uniform, groups))
    assert sizes == [3] * len(sizes)
    assert len({group.group.example.id for group in groups}) == 3
    assert sampler.discarded.completions == 4 * (sum(sizes) - 3)
    assert sampler.discarded.tokens == 3 * sampler.discarded.completions


def test_the_surplus_of_the_last_batch_is_discarded_and_the_next_step_goes_on_behind_it(
    session, monkeypatch
):
    sampler = with_rival(session, "dynamic sampling").sampler
    collected = script(sampler, lambda _, batch: RIGHT if batch == 1 else MIXED, sizes := [])
    monkeypatch.setattr(rivals.Sampler, "collect", collected)
    first = sampler.choose(1)
    used = sampler.collect(1, first, 0)
    assert sizes == [3, 3]
    assert sampler.discarded.completions == 12
    met = Counter(e.id for e in [*first, *(g.group.example for g in used), *sampler.choose(2)])
    assert len(met) == 9  # no prompt came twice


def test_dynamic_sampling_ends_where_no_prompt_has_variance(session, monkeypatch):
    sampler = with_rival(session, "dynamic sampling").sampler
    collected = script(sampler, lambda *_: WRONG, sizes := [])
    monkeypatch.setattr(rivals.Sampler, "collect", collected)
    groups = sampler.collect(1, sampler.choose(1), 0)
    assert sum(sizes) == 12  # every training prompt once
    assert len(groups) == 3
    assert all(map(uniform, groups))
    assert sampler.discarded.completions == 4 * 9


# GRESO


def test_a_prompt_is_skipped_the_more_the_longer_it_had_no_variance(session):
    sampler = with_rival(session, "skipping").sampler
    first = sampler.task.train(0)
    assert sampler.skip_probability(first.id) == 0
    for z, expected in ((1, 0.5), (2, 0.75), (3, 0.875)):
        sampler._see([numbered(session, 0, RIGHT)])
        assert sampler.streaks[first.id] == (rivals.EASY, z)
        assert sampler.skip_probability(first.id) == pytest.approx(expected)
    sampler.streaks[first.id] = (rivals.EASY, 100)
    assert sampler.skip_probability(first.id) == pytest.approx(0.99)
    sampler._see([numbered(session, 0, WRONG)])  # hard now: its own p, from the start
    assert sampler.streaks[first.id] == (rivals.HARD, 1)
    sampler._see([numbered(session, 0, MIXED)])
    assert sampler.skip_probability(first.id) == 0


def test_prompts_are_skipped_as_often_as_that_says(session):
    sampler = with_rival(session, "skipping").sampler
    example = sampler.task.train(0)
    sampler.streaks[example.id] = (rivals.HARD, 2)
    admitted = 0
    for sampler._cursor in range(400):
        admitted += sampler._admits(example)
    assert 0.17 < admitted / 400 < 0.33  # 1/4, three standard deviations


def test_exploration_falls_where_too_many_groups_have_no_variance(session):
    sampler = with_rival(session, "skipping").sampler
    groups = [numbered(session, n, r) for n, r in enumerate([RIGHT, WRONG, *[MIXED] * 8])]
    sampler._see(groups)
    assert sampler.p == [0.5, 0.5]  # the first epoch changes nothing
    sampler._cursor = 13
    sampler._see(groups)
    # A tenth each: more than 1/12 is too many easy ones, less than 1/6 too few hard ones.
    assert sampler.p == pytest.approx([0.49, 0.51])
    sampler.p = [0.05, 0.95]
    sampler._see(groups)
    assert sampler.p == [0.05, 0.95]


def test_the_next_batch_is_as_large_as_the_missing_groups_need(session):
    sampler = with_rival(session, "skipping").sampler
    assert sampler._first_size() == 5  # 1.5 of 3, rounded up
    half = [numbered(session, 0, MIXED), numbered(session, 1, RIGHT)]
    assert sampler._next_size(1, half) == 3  # 1.25 / (1 - 0.5), rounded up
    assert sampler._next_size(3, half) == 5  # at most the first size
    assert sampler._next_size(1, half[1:]) == 5


def test_skipping_never_leaves_a_step_without_a_prompt(session, monkeypatch):
    sampler = with_rival(session, "skipping").sampler
    monkeypatch.setattr(Skipping, "_admits", lambda self, example: False)
    assert len(sampler.choose(1)) == 1


# CPPO


def test_cppo_keeps_the_completions_with_the_largest_advantages():
    pruned = keep_largest(Credit((0.1, -0.9, None, 0.4, -0.5), (0.2,) * 5), 2)
    assert pruned.advantages == pytest.approx((0.0, -0.9 * 2.5, None, 0.0, -0.5 * 2.5))
    assert pruned.weights == (0.2,) * 5


def test_cppo_keeps_the_first_of_equal_ones():
    pruned = keep_largest(Credit((0.5, -0.5, 0.5, -0.5), (0.25,) * 4), 2)
    assert pruned.advantages == (1.0, -1.0, 0.0, 0.0)


def test_cppo_is_biased():
    """One right answer of four: it is kept with one wrong one, and its weight has doubled."""
    credit = assign_credit(scored(flat_group(4), (1.0, 0.0, 0.0, 0.0)))
    pruned = keep_largest(credit, 2)
    assert credit.advantages == pytest.approx((1.0, -1 / 3, -1 / 3, -1 / 3))
    assert sum(a or 0 for a in credit.advantages) == pytest.approx(0)
    assert sum(a or 0 for a in pruned.advantages) == pytest.approx(2 - 2 / 3)


def test_pruned_completions_are_not_in_the_batch(session):
    staged = with_rival(session, "pruning")
    sampler = staged.sampler
    groups = sampler.collect(1, sampler.choose(1), 0)
    credits = [staged.credit(1, group) for group in groups]
    selection = staged.select(1, groups, credits)
    for group, dropped in zip(groups, selection.dropped, strict=True):
        if not uniform(group):
            assert dropped.count(None) == 2
