"""Constants from two short passes, and the file that keeps them."""

from __future__ import annotations

import gc
import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
import tiny

from localrl.backend import tree_flatten
from localrl.config import RunConfig
from localrl.engines.memory import engines_for
from localrl.learning.update import Updater
from localrl.memory import calibration
from localrl.memory.calibration import Probe, key_of, recall, remember, solve, store
from localrl.memory.estimate import Coefficients, Estimate, estimate
from localrl.memory.limit import Limit
from localrl.memory.machine import Machine
from localrl.memory.plan import MEASURED_SHARE, fit
from localrl.memory.sizes import quantised, read_sizes
from localrl.records import Batch, BatchNode
from localrl.settings import LearningConfig
from localrl.training.calibrate import calibrate_plan, measure, peak_of
from localrl.training.memory_plan import (
    make_plan,
    plan_request,
    sizes_of,
    with_engine,
    worth_measuring,
)

MIB = 2**20
MEASURED = Coefficients(linear=1.3, quadratic=0.8, measured=True)


def probe(linear, quadratic, peak, head=0, gradients=0) -> Probe:
    found = Estimate(0, 0, 0, 0, 0, 0, linear, quadratic, head, gradients, 0)
    return Probe(found, peak)


def test_two_passes_show_both_factors():
    """One of length 1, one of length 4: 100 b + 10 c + 5, and 400 b + 160 c + 5."""
    for b, c in ((1.0, 1.0), (1.3, 0.8), (0.7, 2.0)):
        peaks = [round(100 * b + 10 * c + 5), round(400 * b + 160 * c + 5)]
        found = solve([probe(100, 10, peaks[0], 5, 99), probe(400, 160, peaks[1], 5, 99)])
        assert found is not None
        assert found.measured
        # The priors draw both to 1, the second one more.
        assert found.linear == pytest.approx(b, abs=0.12)
        assert found.quadratic == pytest.approx(c, abs=0.65 * abs(c - 1) + 0.02)
        explained = 400 * found.linear + 160 * found.quadratic + 5 * found.head
        assert explained == pytest.approx(peaks[1], rel=0.06)


def test_what_was_not_seen_stays_as_it_was_thought():
    """Scores that take nothing in short passes say nothing on long ones."""
    found = solve([probe(1000, 1, 1501), probe(2000, 4, 3004)])
    assert found is not None
    assert found.linear == pytest.approx(1.5, abs=0.01)
    assert found.quadratic == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("peaks", [(10, 40), (2000, 8000), (500, 10), (10**12, 10**12)])
def test_absurd_peaks_are_no_measurement(peaks):
    assert solve([probe(100, 10, peaks[0]), probe(400, 160, peaks[1])]) is None


def test_constants_are_kept(tmp_path):
    file = tmp_path / "deep" / "memory.json"
    assert recall("a", file) is None
    assert remember("a", MEASURED, file) is None
    assert remember("b", replace(MEASURED, linear=2.0), file) is None
    assert recall("a", file) == MEASURED
    assert recall("b", file) == replace(MEASURED, linear=2.0)
    assert recall("c", file) is None
    assert [path.name for path in file.parent.iterdir()] == ["memory.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"a"', '{"a": 3}', '{"a": {"linear": 1}}', "\xff",
     '{"a": {"linear": "x", "quadratic": 1}}', '{"a": {"linear": 99, "quadratic": 1}}',
     '{"a": {"linear": NaN, "quadratic": 1}}'],
)  # fmt: skip
def test_a_file_that_says_nothing_is_as_none(tmp_path, text):
    file = tmp_path / "memory.json"
    file.write_bytes(text.encode("latin-1"))
    assert recall("a", file) is None
    assert remember("a", MEASURED, file) is None
    assert recall("a", file) == MEASURED


def test_other_entries_of_the_file_stay(tmp_path):
    file = tmp_path / "memory.json"
    file.write_text('{"later": {"other": 1}}')
    remember("a", MEASURED, file)
    assert json.loads(file.read_text())["later"] == {"other": 1}


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    told = remember("a", MEASURED, tmp_path / "file" / "memory.json")
    assert told is not None
    assert "cannot be written" in told
    assert recall("a", tmp_path / "file" / "memory.json") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    told = remember("a", MEASURED, tmp_path / "memory.json")
    tmp_path.chmod(stat.S_IRWXU)
    assert told is not None
    assert "Permission denied" in told


def test_the_place_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store() == tmp_path / "localrl" / "memory.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store().is_relative_to(tmp_path)
    assert store().name == "memory.json"


def wish(sizes, limit=None, **settings):
    """What a run asks of a host of 1,000 GB, or under a limit of so many bytes."""
    machine = Machine("Linux", "cpu", total_bytes=10**12, available_bytes=10**12)
    given = {"model.path": "m", "model.engine": "mlx", **settings}  # others are counted
    made = plan_request(RunConfig.create(given), sizes, machine)
    return replace(made, limit=Limit(limit, "a test", from_machine=False)) if limit else made


def test_constants_hold_for_one_shape_one_adapter_and_one_mlx(monkeypatch):
    sizes = read_sizes(tiny.CONFIG, weight_bytes=100)

    def key(sizes=sizes, **settings):
        made = wish(sizes, **settings)
        return key_of(made.sizes, made.workloads[made.plan.group_size], made.plan)

    # Where the files are, and what is asked of the model, does not matter.
    assert key() == key(read_sizes(tiny.CONFIG)) == key(**{"rollout.group_size": 8})
    others = {
        key(**{"lora.rank": 3}),
        key(**{"lora.layers": 1}),
        key(**{"lora.keys": ["self_attn.q_proj"]}),
        key(read_sizes({**tiny.CONFIG, "hidden_size": 128})),
        key(quantised(sizes, 4)),
    }
    monkeypatch.setattr(calibration, "version", lambda name: "99.9")
    others.add(key())
    assert len(others) == 6
    monkeypatch.undo()
    assert key() not in others


def test_stored_constants_are_used_next_time_but_for_group_and_length(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    large = {"rollout.group_size": 8, "memory.decode_rows": 8, "memory.micro_rows": 32}
    config = RunConfig.create({"model.path": "m", **large})
    sizes = read_sizes(tiny.CONFIG)
    whole = wish(sizes, 10**12, **large)
    made = wish(sizes, int(0.6 * whole.needed(whole.plan)), **large)
    first = make_plan(config, made)
    assert not first.measured
    assert worth_measuring(config, made, first)
    remember(
        key_of(sizes, made.workloads[8], made.plan),
        Coefficients(linear=0.5, quadratic=0.5, measured=True),
    )
    second = make_plan(config, made)
    assert second.measured
    assert not worth_measuring(config, made, second)
    assert second.micro_rows > first.micro_rows
    assert (second.group_size, second.max_completion_tokens) == (8, 256)
    again = config.replace("memory.recalibrate", True)
    assert make_plan(again, made) == first
    assert worth_measuring(again, made, second)


def test_only_what_is_near_its_limit_is_measured():
    config = RunConfig.create({"model.path": "m"})
    made = wish(read_sizes(tiny.CONFIG))
    plan = make_plan(config, made)
    assert not worth_measuring(config, made, plan)
    assert worth_measuring(config, made, replace(plan, predicted_bytes=60, limit_bytes=100))
    assert not worth_measuring(config, made, replace(plan, predicted_bytes=40, limit_bytes=100))
    assert not worth_measuring(config, made, replace(plan, predicted_bytes=60, limit_bytes=None))
    counted = wish(read_sizes(tiny.CONFIG), **{"model.engine": "auto"})
    assert not worth_measuring(config, counted, replace(plan, predicted_bytes=60, limit_bytes=100))
    pinned = config.replace("memory.pin", "plan.json")
    assert not worth_measuring(pinned, made, replace(plan, predicted_bytes=60, limit_bytes=100))


SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2000,
}
FAMILIES = {
    "qwen3": {},
    "gemma3_text": tiny.FAMILIES["gemma3_text"] | {"sliding_window": 32},
}
WANTED = {
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.max_prompt_tokens": 64,
    "rollout.max_completion_tokens": 192,
    "memory.micro_rows": 4,
    "task.eval_prompts": 0,
}


SHORT = WANTED | {"rollout.max_prompt_tokens": 32, "rollout.max_completion_tokens": 32}


@pytest.fixture(scope="module", params=FAMILIES)
def learner(request, tmp_path_factory):
    """An updater of a real model, and what a run on it asks."""
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny.make_folder(folder, **{**FAMILIES[request.param], **SHAPE})
    policy = tiny.make_tiny_policy(folder, rank=8, **{**FAMILIES[request.param], **SHAPE})
    return Updater(policy, LearningConfig(), 1.0), sizes_of(folder, 0)


def long_batch(prompts, group, prompt_tokens, tokens, vocabulary):
    """Completions that are all as long as they may be, different ones."""
    nodes = []
    for n in range(prompts * group):
        ids = ((np.arange(tokens) * 31 + 17 * n) % vocabulary).astype(np.int32)
        ones = np.ones(tokens, np.float32)
        nodes.append(BatchNode(n // group, -1, ids, ones * (-1) ** n, -8 * ones, True, 0 * ones))
    texts = [tuple((np.arange(prompt_tokens) + p) % vocabulary) for p in range(prompts)]
    return Batch(tuple(tuple(map(int, t)) for t in texts), tuple(nodes), 1.0)


def weights(updater):
    return {name: np.array(a) for name, a in tree_flatten(updater.policy.model.parameters())}


def test_after_two_short_passes_the_prediction_holds(learner, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    updater, sizes = learner
    made = wish(sizes, 10**9, **WANTED)
    before, warned = weights(updater), []
    plan = calibrate_plan(updater.gradient, made, made.plan, warned.append, anew=False)
    assert warned == []
    assert plan.measured
    workload = made.workloads[4]
    coefficients = recall(key_of(sizes, workload, plan))
    assert coefficients is not None
    for micro_rows in (4, 1):
        now = replace(plan, micro_rows=micro_rows)
        batch = long_batch(1, 4, 64, 192, sizes.vocabulary)
        gc.collect()
        measured = peak_of(lambda batch=batch, now=now: updater.gradient(batch, now))
        predicted = estimate(sizes, workload, now, coefficients).update
        assert abs(predicted - measured) < max(0.1 * measured, 16 * MIB), (predicted, measured)
    after = weights(updater)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert updater.updates == 0


def test_the_probes_are_short(learner):
    """Two lengths, half of what the plan allows at most, and no more paths at once."""
    updater, sizes = learner
    made = wish(sizes, 10**9, **SHORT)
    seen = []

    class Watched:
        shared = True

        def __call__(self, batch, plan):
            seen.append((len(batch.nodes), max(len(node.token_ids) for node in batch.nodes)))
            return updater.gradient(batch, plan)

    assert measure(Watched(), made, made.plan) is not None  # type: ignore[arg-type]
    assert len({tokens for _, tokens in seen}) == 2
    assert max(tokens for _, tokens in seen) <= (32 + 32) // 2
    assert max(paths for paths, _ in seen) <= made.plan.micro_rows


def test_what_no_constants_explain_is_said_and_priors_stay(learner, monkeypatch):
    from localrl.training import calibrate

    updater, sizes = learner
    made = wish(sizes, 10**9, **SHORT)
    monkeypatch.setattr(calibrate, "peak_of", lambda work: 10**12)
    warned = []
    assert calibrate_plan(updater.gradient, made, made.plan, warned.append, anew=False) == made.plan
    assert "the plan uses priors" in warned[0]


def test_what_cannot_be_stored_is_said_and_used(learner, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    updater, sizes = learner
    made = wish(sizes, 10**9, **SHORT)
    warned = []
    assert calibrate_plan(updater.gradient, made, made.plan, warned.append, anew=False).measured
    assert "could not store" in warned[0]


def test_calibrating_anew_may_change_group_and_length(learner, tmp_path, monkeypatch):
    """Priors had given up a part of the completion; the machine's own constants leave it whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    updater, sizes = learner
    made = wish(sizes, 10**9, **SHORT)
    short = replace(made.plan, max_completion_tokens=24)
    kept = calibrate_plan(updater.gradient, made, short, print, anew=False)
    assert kept.max_completion_tokens == 24
    anew = calibrate_plan(updater.gradient, made, short, print, anew=True)
    assert anew.max_completion_tokens == 32
    assert anew.predicted_bytes <= MEASURED_SHARE * 10**9


def test_constants_of_another_formula_are_not_taken(monkeypatch):
    made = wish(read_sizes(tiny.CONFIG))
    workload = made.workloads[made.plan.group_size]
    keys = {
        key_of(made.sizes, replace(workload, engines=(engine,)), made.plan)
        for engine in engines_for("auto", device="cpu")
    }
    assert key_of(made.sizes, workload, made.plan) in keys  # as its sizes let expect
    monkeypatch.setattr(calibration, "FORMULA", -1)
    assert key_of(made.sizes, workload, made.plan) not in keys
    assert len(keys) == 2


def test_a_model_that_mlx_has_to_compute_gets_another_plan():
    made = wish(
        read_sizes(tiny.CONFIG), 10**12, **{"memory.micro_rows": 32, "model.engine": "auto"}
    )
    limit = made.needed(made.plan)
    made = replace(made, limit=replace(made.limit, bytes=limit))
    plan = fit(made)
    assert with_engine(made, plan, engine="cpu", fixed=False)[1] == plan
    assert with_engine(made, plan, engine="mlx", fixed=True)[1] == plan
    request, found = with_engine(made, plan, engine="mlx", fixed=False)
    assert found.micro_rows < plan.micro_rows
    assert request.estimate(found).peak <= limit < request.estimate(plan).peak
