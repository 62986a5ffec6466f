"""What is not finite never stays in the weights: a bad step is skipped, several end the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from forests import flat_group, scored
from steps import plan, selection

from localrl import RunConfig, train
from localrl.backend import tree_flatten
from localrl.errors import LocalRLError
from localrl.learning.gradient import GradientPass
from localrl.learning.objectives import OBJECTIVES
from localrl.learning.update import NO_UPDATE, Updater
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.logs import read_jsonl
from localrl.settings import LearningConfig
from localrl.training.session import NullProgress
from localrl.training.state import read

SHORT = f"{Path(__file__).parent / 'worker_functions.py'}:short"
BAD_STEP = 3


def config(folder, out, **changes):
    settings = {
        "model.path": str(folder),
        "task.rewards": SHORT,
        "task.eval_prompts": 0,
        "rollout.prompts_per_step": 4,
        "rollout.group_size": 4,
        "rollout.max_completion_tokens": 12,
        "rollout.max_prompt_tokens": 40,
        "learning.lr": 1e-3,
        "run.steps": 5,
        "run.out": str(out),
    }
    return RunConfig.create(settings | changes)


def adapter(folder):
    return (folder / "adapter" / "adapters.safetensors").read_bytes()


@pytest.mark.exact
def test_a_nan_at_a_step_leaves_the_weights_of_a_run_that_skipped_it(
    tiny_folder, tmp_path, monkeypatch, engine
):
    on = {"model.engine": engine}
    plain = adapter(train(config(tiny_folder, tmp_path / "plain", **on)).folder)
    real, calls = GradientPass.__call__, []

    def poisoned(self, batch, plan, first):
        """The real gradient, with a NaN in one coefficient of the third step's batch."""
        calls.append(batch)
        if len(calls) == BAD_STEP:
            node = next(node for node in batch.nodes if node.trained.any())
            coefficients = node.coefficients.copy()
            coefficients[node.trained.argmax()] = np.nan
            nodes = [replace(n, coefficients=coefficients) if n is node else n for n in batch.nodes]
            batch = replace(batch, nodes=tuple(nodes))
        return real(self, batch, plan, first)

    monkeypatch.setattr(GradientPass, "__call__", poisoned)
    folder = train(config(tiny_folder, tmp_path / "poisoned", **on)).folder
    monkeypatch.undo()
    update, steps = Updater.update, []

    def skipping(self, batch, plan):
        steps.append(batch)
        return NO_UPDATE if len(steps) == BAD_STEP else update(self, batch, plan)

    monkeypatch.setattr(Updater, "update", skipping)
    skipped = train(config(tiny_folder, tmp_path / "skipped", **on)).folder
    assert adapter(folder) == adapter(skipped) != plain
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "reward" in line]
    assert [line["update/applied"] for line in lines] == [True, True, False, True, True]
    told = [e for e in read_jsonl(folder / "events.jsonl") if e["kind"] == "update_skipped"]
    assert [event["step"] for event in told] == [BAD_STEP]
    assert "loss nan" in told[0]["reason"]


@pytest.mark.parametrize("lr", [1e20, 1e39])
def test_a_diverging_run_ends_and_its_last_good_state_can_be_read(
    tiny_folder, tmp_path, lr, engine
):
    out = tmp_path / "run"
    with pytest.raises(LocalRLError, match=r"3 times in a row .* learning\.lr below 1e\+"):
        train(config(tiny_folder, out, **{"learning.lr": lr, "model.engine": engine}))
    newest = Checkpoints(out / "checkpoints", pytest.fail).newest()
    state = read(newest)
    assert state.step == 2
    assert all(np.isfinite(np.array(array)).all() for array in state.weights.values())
    told = list(read_jsonl(out / "events.jsonl"))
    assert [e["step"] for e in told if e["kind"] == "update_skipped"] == [1, 2]
    assert "learning.lr" in next(e for e in told if e["kind"] == "failed")["reason"]


def everything(updater):
    parts = (updater.policy.model.trainable_parameters(), updater.optimizer.state)
    return {name: np.array(array) for name, array in tree_flatten(parts)}


@pytest.mark.exact
@pytest.mark.parametrize(
    ("lr", "problem"),
    [(1e39, "updated adapters were not finite"), (1e20, "log-probabilities after the update")],
)
@pytest.mark.parametrize("updates", [1, 3])
def test_a_bad_update_is_taken_back_whole(tmp_path, lr, problem, updates):
    batch = selection(OBJECTIVES["clipped"], [scored(flat_group(3), [1, 0, 0])]).batch
    policies = [tiny.make_tiny_policy(tmp_path / name, trained=False) for name in "ab"]
    learning = LearningConfig(lr=1e-3, warmup_steps=0, updates_per_step=updates)
    bad, good = (Updater(policy, learning, 1.0) for policy in policies)
    for updater in (bad, good):
        assert updater.update(batch, plan()).updated
    before = everything(bad)
    bad.config = replace(learning, lr=lr)
    stats = bad.update(batch, plan())
    assert (stats.updated, stats.drift, bad.updates, bad.skipped) == (False, None, updates, 1)
    assert problem in stats.problem
    after = everything(bad)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    bad.config = learning
    assert bad.update(batch, plan()) == good.update(batch, plan())
    assert bad.skipped == 0
    one, other = everything(bad), everything(good)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_warnings_are_events_and_a_run_that_goes_on_does_not_repeat_them(tiny_folder, tmp_path):
    class Listener(NullProgress):
        def __init__(self):
            self.lines = []

        def warn(self, line):
            self.lines.append(line)

    # A random model never ends an answer of three tokens.
    settings = {"rollout.max_completion_tokens": 3, "learning.lr": 0.0}
    first, second = Listener(), Listener()
    out = tmp_path / "run"
    train(config(tiny_folder, out, **settings), progress=first)
    more = {**settings, "run.steps": 8}
    train(config(tiny_folder, out, **more), resume=True, progress=second)
    told = [e for e in read_jsonl(out / "events.jsonl") if e["kind"] == "warning"]
    assert [(e["step"], e["name"]) for e in told] == [(5, "truncation")]
    assert told[0]["text"] in first.lines
    assert told[0]["text"] not in second.lines
    sizes = [m["update/relative_size"] for m in read_jsonl(out / "metrics.jsonl") if "reward" in m]
    assert {size for size in sizes if size is not None} <= {0.0}
