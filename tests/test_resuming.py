"""A run that was interrupted goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import shutil
from datetime import date
from functools import partial
from pathlib import Path

import pytest
import tiny

from localrl.config import REMOVED, RunConfig
from localrl.errors import CheckpointError, ConfigError, Stopped
from localrl.export.adapters import adapter_of, write_adapter
from localrl.processes.heartbeat import Heartbeat
from localrl.runs.checkpoints import Checkpoints, damage
from localrl.runs.logs import read_jsonl
from localrl.train import train
from localrl.training.resuming import reopen
from localrl.training.state import check_sources

HERE = Path(__file__).parent
SMALL = {
    "task.name": "sums",
    "task.train_prompts": 6,
    "task.eval_prompts": 4,
    "rollout.prompts_per_step": 3,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 10,
    "learning.lr": 0.05,
    "learning.warmup_steps": 2,
    "run.steps": 6,
    "run.eval_every": 3,
    "run.checkpoint_every": 2,
}
PARTS = {
    "trees": {
        "rollout.strategy": "tree",
        "rollout.fork_rule": "entropy",
        "rollout.reuse": 0.5,
        "learning.kl_coef": 0.01,
        "learning.updates_per_step": 2,
    },
    "rounds": {
        "rollout.strategy": "adaptive",
        "learning.min_advantage": 0.05,
        "learning.minibatches": 2,
    },
}
UNTIMED = ("time/", "memory/", "step_time")


def config(folder, out, **changes):
    return RunConfig.create({"model.path": str(folder), "run.out": str(out), **SMALL, **changes})


class StopAt(Heartbeat):
    """A heartbeat that stops at one of its beats, not counting those before there is a run."""

    def __init__(self, beat):
        super().__init__()
        self.left = beat

    def beat(self, work=None):
        opening = work is not None and not work.total and not work.name.startswith("scoring")
        self.left -= not opening
        if self.left == 0 and not opening:
            self.stop("the test says so")
        super().beat(work)


def outcome(out):
    """All that a run leaves behind, but for times and memory."""
    metrics = [
        {k: v for k, v in line.items() if not k.startswith(UNTIMED)}
        for line in read_jsonl(out / "metrics.jsonl")
    ]
    return (
        (out / "adapter" / "adapters.safetensors").read_bytes(),
        (out / "rollouts.jsonl").read_bytes(),
        metrics,
        (out / "eval.json").read_bytes(),
    )


@pytest.fixture(scope="module", params=PARTS)
def whole(request, tiny_folder, tmp_path_factory, engine):
    """An uninterrupted run, and the beats that it has."""
    out, settings = tmp_path_factory.mktemp("whole") / "run", PARTS[request.param]
    settings = settings | {"model.engine": engine}
    counter = StopAt(0)
    train(config(tiny_folder, out, **settings), heartbeat=counter)
    return settings, outcome(out), -counter.left


@pytest.mark.exact
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny_folder, tmp_path, whole, share):
    settings, expected, beats = whole
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(config(tiny_folder, out, **settings), heartbeat=StopAt(max(1, int(beats * share))))
    result = train(config(tiny_folder, out, **settings), resume=True)
    assert result.steps == 6
    assert outcome(out) == expected
    assert [e["kind"] for e in read_jsonl(out / "events.jsonl")].count("resumed") == 1


@pytest.mark.exact
def test_stopping_again_and_again(tiny_folder, tmp_path, whole):
    settings, expected, beats = whole
    out, resume = tmp_path / "run", False
    for _ in range(30):
        try:
            train(
                config(tiny_folder, out, **settings),
                resume=resume,
                heartbeat=StopAt(beats // 3),
            )
            break
        except Stopped:
            resume = True
    else:
        pytest.fail("it never came to an end")
    assert outcome(out) == expected


def stopped(folder, out, **changes):
    """A run that was stopped in its last step."""
    with pytest.raises(Stopped, match=f"localrl train --resume --out {out}"):
        train(config(folder, out, **{"run.eval_every": 0, **changes}), heartbeat=StopAt(60))
    return config(folder, out, **{"run.eval_every": 0, **changes})


def test_settings_that_would_make_another_run_may_not_change(tiny_folder, tmp_path):
    same = stopped(tiny_folder, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"learning.lr was 0.05 and is 0.1; run.seed was 0 and"):
        train(same.replace("learning.lr", 0.1).replace("run.seed", 3), resume=True)
    result = train(same.replace("run.steps", 7), resume=True)
    assert result.steps == 7
    (event,) = [e for e in read_jsonl(tmp_path / "run/events.jsonl") if e["kind"] == "resumed"]
    assert event["changed"] == {"run.steps": {"was": 6, "is": 7}}
    steps = [m["step"] for m in read_jsonl(tmp_path / "run/metrics.jsonl") if "reward" in m]
    assert steps == list(range(1, 8))


def test_a_resumed_run_keeps_its_day_and_may_allow_longer_prompts(
    tiny_folder, tmp_path, monkeypatch
):
    same = stopped(tiny_folder, tmp_path / "run")
    began = RunConfig.of_run(tmp_path / "run" / "config.toml").model.template_date
    assert began == date.today().isoformat()

    class Later(date):
        @classmethod
        def today(cls):
            return date(2099, 1, 1)

    monkeypatch.setattr("localrl.training.setup.date", Later)
    train(same.replace("rollout.max_prompt_tokens", 4000), resume=True)
    now = RunConfig.of_run(tmp_path / "run" / "config.toml")
    assert (now.model.template_date, now.rollout.max_prompt_tokens) == (began, 4000)
    other = train(config(tiny_folder, tmp_path / "other", **{"run.steps": 0}))
    assert RunConfig.of_run(other.folder / "config.toml").model.template_date == "2099-01-01"


def test_another_model_or_other_data_are_another_run(tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "{n}", "answer": "{n}"}}\n' for n in range(9)]
    rows.write_text("".join(lines))
    changes = {"task.name": str(rows), "task.train_prompts": 0, "task.rewards": ["accuracy"]}
    same = stopped(tiny_folder, tmp_path / "run", **changes)
    rows.write_text("".join(lines[:-1]))
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    with pytest.raises(CheckpointError, match="The data of this run has changed"):
        train(same.replace("run.steps", 9), resume=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.exact
def test_the_kl_of_a_resumed_run_is_still_measured_from_the_adapter_given(tiny_folder, tmp_path):
    given, out = tmp_path / "given", tmp_path / "run"
    model = tiny.make_tiny_policy(tmp_path / "model", seed=3).model
    write_adapter(adapter_of(model), given)
    settings = {
        "lora.adapter": str(given),
        "learning.kl_coef": 0.1,
        "task.eval_prompts": 0,
        "task.rewards": f"{HERE / 'worker_functions.py'}:short",
    }
    train(config(tiny_folder, tmp_path / "whole", **settings))
    whole = list(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert whole[-1]["kl"] > 1e-4
    with pytest.raises(Stopped):
        train(config(tiny_folder, out, **settings), heartbeat=StopAt(60))
    given.rename(tmp_path / "aside")
    tiny.stir(model, 4)
    write_adapter(adapter_of(model), given)
    with pytest.raises(CheckpointError, match="The starting adapter of this run has changed"):
        train(config(tiny_folder, out, **settings), resume=True)
    shutil.rmtree(given)
    (tmp_path / "aside").rename(given)
    train(config(tiny_folder, out, **settings), resume=True)
    assert [m["kl"] for m in read_jsonl(out / "metrics.jsonl")] == [m["kl"] for m in whole]


@pytest.mark.exact
def test_the_starting_adapter_is_needed_only_for_the_kl_or_without_a_checkpoint(
    tiny_folder, tmp_path
):
    given, out = tmp_path / "given", tmp_path / "run"
    model = tiny.make_tiny_policy(tmp_path / "model", seed=3, rank=2).model
    write_adapter(adapter_of(model), given)
    settings = {"lora.adapter": str(given), "task.eval_prompts": 0, "run.steps": 2}
    whole = train(config(tiny_folder, tmp_path / "whole", **settings))
    train(config(tiny_folder, out, **settings | {"run.steps": 1}))
    given.rename(tmp_path / "aside")
    again = config(tiny_folder, out, **settings)
    shutil.copytree(out, tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "checkpoints")
    with pytest.raises(ConfigError, match=r"no longer in .*given.* resuming .* no checkpoint yet"):
        train(again.replace("run.out", str(tmp_path / "early")), resume=True)
    with pytest.raises(ConfigError, match="its KL is measured from it"):
        train(again.replace("learning.kl_coef", 0.1), resume=True)
    with pytest.raises(ConfigError, match=r"lora.rank was 2 and is 3"):
        train(again.replace("lora.rank", 3), resume=True)
    assert adapter_bytes(train(again, resume=True)) == adapter_bytes(whole)


def adapter_bytes(result):
    return (result.folder / "adapter" / "adapters.safetensors").read_bytes()


def test_a_checkpoint_of_a_run_whose_kl_was_measured_from_the_base_is_refused():
    check_sources({"model": "a", "data": "b"}, {"model": "a", "data": "b"})
    with pytest.raises(CheckpointError, match="by an earlier version of localrl"):
        check_sources({"model": "a"}, {"model": "a", "starting adapter": "b"})


KEPT = {"run.eval_every": 0, "run.checkpoint_every": 1, "run.keep_every": 2}


@pytest.fixture(scope="module")
def kept(tiny_folder, tmp_path_factory):
    """A finished run with the checkpoints of steps 0, 2, 4, 5 and 6."""
    out = tmp_path_factory.mktemp("kept") / "run"
    train(config(tiny_folder, out, **KEPT))
    return out


def lose(file, step):
    """Cut a log within the first line of this step."""
    lines = file.read_bytes().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == step)
    file.write_bytes(b"".join(lines[:first]) + lines[first][:9])


@pytest.mark.exact
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tiny_folder, tmp_path, kept):
    out = tmp_path / "run"
    shutil.copytree(kept, out)
    file = out / "checkpoints" / "step-000006" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    train(config(tiny_folder, out, **KEPT), resume=True)
    assert resumed(out)[0] == 5
    assert outcome(out) == outcome(kept)


def resumed(out):
    (event,) = [e for e in read_jsonl(out / "events.jsonl") if e["kind"] == "resumed"]
    return event["step"], event["unused"], event["lost"]


@pytest.mark.exact
@pytest.mark.parametrize(
    ("step", "begins", "unused"),
    [(6, 5, [6]), (3, 2, [4, 5, 6])],
)
def test_a_run_whose_metrics_have_lost_lines_goes_on_from_a_checkpoint_that_fits(
    tiny_folder, tmp_path, kept, step, begins, unused
):
    out = tmp_path / "run"
    shutil.copytree(kept, out)
    lose(out / "metrics.jsonl", step)
    train(config(tiny_folder, out, **KEPT), resume=True)
    assert outcome(out) == outcome(kept)
    names = [f"unused-step-{number:06d}" for number in reversed(unused)]
    assert resumed(out) == (begins, names, [])
    assert [damage(out / "checkpoints" / name) for name in names] == [None] * len(names)


@pytest.mark.exact
@pytest.mark.parametrize(("name", "left"), [("metrics", [1, 2]), ("rollouts", [])])
def test_whole_checkpoints_are_used_even_if_none_fits(tiny_folder, tmp_path, kept, name, left):
    out = tmp_path / "run"
    shutil.copytree(kept, out)
    for step in (0, 2, 4, 6):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}")
    if left:
        lose(out / f"{name}.jsonl", left[-1] + 1)
    else:
        (out / f"{name}.jsonl").unlink()
    train(config(tiny_folder, out, **KEPT), resume=True)
    assert outcome(out)[0] == outcome(kept)[0]
    assert resumed(out) == (5, [], [f"{name}.jsonl"])
    lines = read_jsonl(out / f"{name}.jsonl")
    assert sorted({line["step"] for line in lines if "eval/n" not in line}) == [*left, 6]


NULS = b"\0" * 40
LOGS = {
    # edit of a log's lines: where the run continues, and the checkpoints it leaves unused
    ("rollouts", "none"): (6, []),
    ("rollouts", "first"): (6, []),
    ("rollouts", "nuls"): (6, []),
    ("metrics", "none"): (6, []),
    ("metrics", "first"): (6, []),  # the evaluation of step 0, whose checkpoint would lose all
    ("metrics", "blank"): (6, []),
    ("metrics", "doubled"): (6, []),
    ("metrics", "nuls"): (2, [6, 5, 4]),
    ("metrics", "nuls for a line"): (2, [6, 5, 4]),
    ("metrics", "nuls in a line"): (2, [6, 5, 4]),
    ("metrics", "nuls at the end"): (6, []),
}


def edit(file, how):
    """Damage a log; the fourth of the metrics' lines is that of step 3."""
    lines = file.read_bytes().splitlines(keepends=True)
    fourth = lines[3]
    edited = {
        "none": [],
        "first": lines[:1],
        "blank": [*lines[:3], b"\n", *lines[3:]],
        "doubled": [*lines[:3], *lines[2:]],
        "nuls": [*lines[:3], NULS, *lines[3:]],
        "nuls for a line": [*lines[:3], b"\0" * len(fourth), *lines[4:]],
        "nuls in a line": [*lines[:3], fourth[:20] + NULS + fourth[60:], *lines[4:]],
        "nuls at the end": [*lines, NULS],
    }
    file.write_bytes(b"".join(edited[how]))


def test_a_damaged_log_costs_no_more_training_than_it_must(tmp_path, kept):
    out = tmp_path / "run"
    shutil.copytree(kept, out)
    settings = RunConfig.of_run(out / "config.toml", {"run.out": str(out)})
    for (name, how), expected in LOGS.items():
        file = out / f"{name}.jsonl"
        before = file.read_bytes()
        edit(file, how)
        with reopen(settings, print) as previous:
            assert (previous.state.step, previous.unused) == expected, (name, how)
        file.write_bytes(before)


@pytest.mark.exact
def test_a_run_whose_logs_are_both_damaged_ends_with_what_was_whole(tiny_folder, tmp_path, kept):
    out, newer = tmp_path / "run", config(tiny_folder, tmp_path / "run", **KEPT)
    shutil.copytree(kept, out)
    edit(out / "metrics.jsonl", "nuls")
    (out / "rollouts.jsonl").unlink()
    for step in (2, 4, 5):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}")
    result = train(newer.replace("run.steps", 7), resume=True)
    assert (result.steps, resumed(out)) == (7, (6, [], ["metrics.jsonl", "rollouts.jsonl"]))
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl") if "reward" in line]
    assert steps == [1, 2, 4, 5, 6, 7]
    assert {line["step"] for line in read_jsonl(out / "rollouts.jsonl")} == {7}
    # Nothing is lost since: the logs have all that they had at the newest checkpoint.
    with reopen(RunConfig.of_run(out / "config.toml", {"run.out": str(out)}), print) as previous:
        assert (previous.state.step, previous.unused) == (7, [])


def test_the_best_and_the_last_two_and_every_nth_stay(tiny_folder, tmp_path):
    out = tmp_path / "run"
    settings = {"run.checkpoint_every": 1, "run.keep_every": 4, "run.eval_every": 0}
    train(config(tiny_folder, out, **settings))
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    # Evaluations tie at 0, and the first of equals is the best.
    assert kept == ["step-000000", "step-000004", "step-000005", "step-000006"]


def test_a_run_that_never_got_to_a_checkpoint_begins_again(tiny_folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped, match="Stopped by the test says so, and saved after step 0"):
        train(config(tiny_folder, out), heartbeat=StopAt(1))
    shutil.rmtree(out / "checkpoints")
    assert train(config(tiny_folder, out), resume=True).steps == 6


def as_version_0_1(out):
    """Write the settings and the newest checkpoint of a run as version 0.1 did."""
    file = out / "config.toml"
    text = re.sub(r"(?m)^eval_temperature.*$", "", file.read_text())
    for key, value in REMOVED.items():
        section, name = key.split(".")
        text = re.sub(rf"(?m)^\[{section}\].*$", rf"\g<0>\n{name} = {json.dumps(value)}", text)
    file.write_text(text)
    store = Checkpoints(out / "checkpoints", pytest.fail)
    step = store.steps()[-1]
    folder = store.folder / f"step-{step:06d}"
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = json.loads(contents["state.json"])
    fields = {"capacity": 4096, "_stored": {"mapping": []}}
    fields["counts"] = {"record": "ReplayCounts", "fields": {"drawn": 0}}
    state["values"]["mapping"].append(["replays", {"record": "Replay", "fields": fields}])
    contents["state.json"] = json.dumps(state).encode()
    del contents["manifest.json"]
    files = {name: partial(Path.write_bytes, data=data) for name, data in contents.items()}
    store.save(step, files, size=1)


def test_a_run_of_version_0_1_keeps_what_it_had(tiny_folder, tmp_path):
    out = tmp_path / "run"
    stopped(tiny_folder, out, **{"rollout.temperature": 0.7})
    file = out / "config.toml"
    assert "eval_temperature = 0.7 " in file.read_text()
    as_version_0_1(out)
    assert "replay_groups = 0" in file.read_text()
    result = train(RunConfig.of_run(file, {"run.out": str(out)}), resume=True)
    assert result.adapter is not None
    assert result.adapter.temperature == 1.0
    assert "eval_temperature = 1.0 " in file.read_text()
    assert "replay" not in file.read_text()
