"""The whole loop on a tiny real model: what it writes, what it learns, what it refuses."""

from __future__ import annotations

import json
import socket
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiny

from localrl import RunConfig, backend, train
from localrl.errors import ConfigError, DataError, RewardError
from localrl.runs.logs import read_jsonl
from localrl.runs.metrics import METRICS

SETTINGS = {
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 12,
    "rollout.max_prompt_tokens": 40,
    "task.eval_prompts": 8,
    "learning.lr": 1e-3,
    "run.steps": 3,
}


def run(tiny_folder, out, **changes):
    settings = {**SETTINGS, "model.path": str(tiny_folder), "run.out": str(out), **changes}
    return train(RunConfig.create(settings))


@pytest.fixture(scope="module")
def result(tiny_folder, tmp_path_factory, engine):
    settings = {"run.eval_every": 2, "model.engine": engine}
    return run(tiny_folder, tmp_path_factory.mktemp("runs") / "one", **settings)


def test_the_engine_is_in_the_record(result, engine):
    [event] = [e for e in read_jsonl(result.folder / "events.jsonl") if e["kind"] == "engine"]
    assert event["name"] == engine
    assert (event["kernels"] is None) == (engine == "mlx")
    assert event["device"] == backend.describe().device
    assert RunConfig.create(file=result.folder / "config.toml").model.engine == engine


def test_an_engine_that_cannot_compute_the_model_is_refused(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", **tiny.FAMILIES["lfm2"])
    with pytest.raises(ConfigError, match=r"model.engine is cpu, but .* \(unsupported family\)"):
        run(folder, tmp_path / "run", **{"model.engine": "cpu", "model.dtype": "auto"})
    assert not (tmp_path / "run").exists()


def test_a_run_from_python_is_shown_unless_it_shall_not_be(tiny_folder, tmp_path, capsys):
    run(tiny_folder, tmp_path / "shown", **{"run.steps": 1})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "before training: pass@1" in shown.err
    assert "step 1/1" in shown.err
    settings = {**SETTINGS, "model.path": str(tiny_folder), "run.out": str(tmp_path / "silent")}
    train(RunConfig.create(settings | {"run.steps": 1}), progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_run_folder_holds_everything(result):
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {
        "run.json", "config.toml", "plan.json", "metrics.jsonl", "rollouts.jsonl", "events.jsonl",
        "eval.json", "adapter",
    }  # fmt: skip
    marker = json.loads((result.folder / "run.json").read_text())
    assert {"localrl", "format", "mlx", "mlx_lm", "numpy", "blas"} <= set(marker)
    plan = json.loads((result.folder / "plan.json").read_text())
    assert plan["threads"] >= 1
    assert 0 < plan["predicted_bytes"] < plan["limit_bytes"]


def test_the_objective_is_written_down_for_what_it_is(result, tiny_folder, tmp_path):
    def objective(folder):
        return next(e for e in read_jsonl(folder / "events.jsonl") if e["kind"] == "objective")

    plain = objective(result.folder)
    assert (plain["name"], plain["prompt_weight"], plain["clip_high"]) == ("clipped", "none", 0.28)
    assert set(plain["effective_weight"].values()) == {1.0}
    settings = {"learning.objective": "grpo", "run.steps": 0, "rollout.group_size": 8}
    other = objective(run(tiny_folder, tmp_path / "grpo", **settings).folder)
    # Division by the std: hard and easy prompts count more than even ones.
    assert other["effective_weight"]["0.5"] == pytest.approx(1.7, abs=0.05)
    assert other["effective_weight"]["0.05"] == pytest.approx(2.3, abs=0.05)


def test_the_written_configuration_is_the_one_that_ran(result):
    written = RunConfig.create(file=result.folder / "config.toml")
    assert written.rollout.group_size == 4
    assert tomllib.loads((result.folder / "config.toml").read_text())["run"]["eval_every"] == 2


ELSEWHERE = {
    *("rollout/turns", "tools/call_frequency", "tools/failure_frequency"),
    *("rollout/sequences", "rollout/failed", "eval/loss"),
}
"""Metrics of runs with tools, with agents, or with worked examples alone; their tests see them."""


def test_every_metric_is_in_the_table_and_every_one_of_the_table_is_logged(result):
    logged = set().union(*read_jsonl(result.folder / "metrics.jsonl"))
    known = {name.replace("<name>", "final_answer") for name in METRICS}
    assert logged == known - ELSEWHERE - {name for name in known if name.startswith("ranks/")}


def test_evaluations_come_before_after_and_between(result):
    lines = list(read_jsonl(result.folder / "metrics.jsonl"))
    assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 2, 3]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3]
    written = json.loads((result.folder / "eval.json").read_text())
    assert written["n"] == 8
    for side in ("base", "adapter"):
        assert set(written[side]) == {
            "n", "pass@1", "ci95", "mean_reward", "mean_completion_tokens", "temperature",
        }  # fmt: skip


def test_rollouts_are_written_whole(result):
    lines = list(read_jsonl(result.folder / "rollouts.jsonl"))
    assert len(lines) == 3 * 4
    for line in lines:
        assert len(line["leaves"]) == 4
        for leaf in line["leaves"]:
            node = line["nodes"][leaf["node"]]
            assert len(node["token_ids"]) == len(node["sampled_logprobs"]) <= 12
            assert leaf["reward"] == 0.0  # a random model never gets a sum right


SHORT = {"task.rewards": f"{Path(__file__).parent / 'worker_functions.py'}:short"}
"""Reward short completions: something a random model can learn within a few steps."""


@pytest.mark.exact
def test_the_same_seed_gives_the_same_adapter(tiny_folder, tmp_path):
    files = [
        run(tiny_folder, tmp_path / name, **SHORT, **{"run.seed": seed}).folder / "adapter"
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, same, other = ((path / "adapters.safetensors").read_bytes() for path in files)
    assert one == same
    assert one != other


def test_rewards_rise(tiny_folder, tmp_path):
    result = run(
        tiny_folder,
        tmp_path / "run",
        **SHORT,
        **{"run.steps": 25, "learning.lr": 5e-3, "rollout.prompts_per_step": 8},
    )
    rewards = [line["reward"] for line in read_jsonl(result.folder / "metrics.jsonl")
               if "reward" in line]  # fmt: skip
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert result.adapter.mean_reward > result.base.mean_reward + 0.2


def test_decoding_in_small_batches_trains_the_same(tiny_folder, tmp_path):
    from localrl.backend import mx

    folders = [
        run(
            tiny_folder,
            tmp_path / str(rows),
            **SHORT,
            # In 16 bits results depend on the batch.
            **{"memory.decode_rows": rows, "memory.micro_rows": m, "model.dtype": "fp32"},
        )
        for rows, m in ((16, 16), (3, 5))
    ]
    one, other = (mx.load(str(f.folder / "adapter" / "adapters.safetensors")) for f in folders)
    for name in one:
        np.testing.assert_allclose(np.array(one[name]), np.array(other[name]), atol=2e-4)


def test_no_network_is_touched(tiny_folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run(tiny_folder, tmp_path / "run", **{"run.steps": 1})


def test_no_steps_and_no_evaluation_are_fine(tiny_folder, tmp_path):
    result = run(tiny_folder, tmp_path / "run", **{"run.steps": 0, "task.eval_prompts": 0})
    assert (result.steps, result.base, result.adapter) == (0, None, None)
    assert not (result.folder / "eval.json").exists()


def test_steps_without_any_reward_are_counted_over_a_resume(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def first(completions, trainer_state):\n"
        "    return [None if trainer_state.global_step else 0.0] * len(completions)\n"
    )
    changes = {"task.rewards": [f"{tmp_path}/mine.py:first"], "task.eval_prompts": 0}
    out = run(tiny_folder, tmp_path / "run", **changes).folder  # the last two steps have none
    config = RunConfig.of_run(out / "config.toml", {"run.out": str(out), "run.steps": 9})
    with pytest.raises(RewardError, match="of the last 3 steps got a reward: first gave None"):
        train(config, resume=True, progress=False)
    assert [line["reward"] for line in steps(out)] == [0.0, None, None, None]


@pytest.mark.parametrize("copies", [1, 5])
def test_one_problem_can_be_trained_on(tiny_folder, tmp_path, copies, capsys):
    (tmp_path / "one.jsonl").write_text('{"prompt": "sum 1 2", "answer": "3"}\n' * copies)
    changes = {"task.name": str(tmp_path / "one.jsonl"), "task.rewards": ["accuracy"]}
    with pytest.raises(DataError, match=rf"has {copies} rows? with 1 different prompt"):
        run(tiny_folder, tmp_path / "run", **changes)
    done = run(tiny_folder, tmp_path / "run", **changes, **{"task.eval_prompts": 0})
    assert (done.steps, done.base) == (3, None)
    assert "none held out" in capsys.readouterr().err
    assert len(groups(done.folder)) == 3 * min(copies, 4)


def test_minutes_end_the_training(tiny_folder, tmp_path):
    result = run(tiny_folder, tmp_path / "run", **{"run.steps": 10_000, "run.minutes": 0.02})
    assert 0 < result.steps < 10_000
    assert result.train_s >= 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.name": "step"}, "Unknown task 'step'"),
        ({"model.path": "nowhere"}, "no model in nowhere"),
        (
            {"rollout.group_size": 1, "learning.kappa": 0.0},
            "kappa is 0 and rollout.group_size is 1",
        ),
        ({"learning.minibatches": 17}, "minibatches is 17, but a step has"),
        (
            {"rollout.strategy": "adaptive", "rollout.group_size": 3},
            "group_size is 3, which rounds of 2 completions cannot divide evenly",
        ),
        (
            {"rollout.strategy": "adaptive", "learning.objective": "dapo"},
            "learning.objective=dapo weighs a prompt by its rewards",
        ),
        (
            {"rollout.strategy": "adaptive", "learning.objective": "bnpo"}
            | {"learning.prompt_weight": "none"},
            "learning.objective=bnpo divides by the number of sampled tokens; with rounds",
        ),
        ({"rollout.reuse": 0.1}, "rollout.reuse is 0.1, but of 4 completions"),
        ({"rollout.stop_text": "a" * 99}, "stop text may have 1 to"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_folder, tmp_path, changes, message
):
    with pytest.raises(ConfigError, match=message):
        run(tiny_folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_is_named(tiny_folder, tmp_path):
    with pytest.raises(DataError, match=r"Raise rollout\.max_prompt_tokens"):
        run(tiny_folder, tmp_path / "run", **{"rollout.max_prompt_tokens": 5})


def steps(folder):
    return list(read_jsonl(folder / "metrics.jsonl"))


def groups(folder):
    return list(read_jsonl(folder / "rollouts.jsonl"))


def test_rounds_end_where_rewards_differ_or_nobody_believes_in_more(tiny_folder, tmp_path):
    settings = {"rollout.strategy": "adaptive"}
    # A random model never gets a sum right. At first 3/4 4/5 = 0.6 is the chance of two more wrong
    # ones; then, with none of 16 right, it is 0.98.
    folder = run(tiny_folder, tmp_path / "alike", **settings).folder
    lines = [line for line in steps(folder) if "reward" in line]
    assert [line["rollout/rounds"] for line in lines] == [2, 1, 1]
    assert [line["rollout/completions"] for line in lines] == [16, 8, 8]
    assert [line["selection/no_coefficient"] for line in lines] == [16, 8, 8]
    for group in groups(folder):
        rounds = [node.get("round", 0) for node in group["nodes"]]
        assert rounds == ([0, 0, 1, 1] if group["step"] == 1 else [0, 0])
        assert (group["kept"], group["reason"]) == (False, "no coefficient")
        assert {leaf["dropped"] for leaf in group["leaves"]} == {"no coefficient"}
    folder = run(tiny_folder, tmp_path / "mixed", **SHORT, **settings).folder
    sizes = {1: set(), 2: set()}
    for group in groups(folder):
        first = {leaf["reward"] for leaf in group["leaves"][:2]}
        sizes[len(first)].add(len(group["leaves"]))
        assert group["planned_roots"] == 4
    assert sizes[2] == {2}
    assert 4 in sizes[1]


def test_a_completion_alone_is_compared_with_what_was_known(tiny_folder, tmp_path):
    settings = {"rollout.group_size": 1, "task.train_prompts": 64}
    folder = run(tiny_folder, tmp_path / "run", **SHORT, **settings).folder
    objective = next(e for e in read_jsonl(folder / "events.jsonl") if e["kind"] == "objective")
    assert objective["effective_weight"] is None
    told = groups(folder)
    assert all(len(group["leaves"]) == 1 for group in told)
    first = [group for group in told if group["step"] == 1]
    assert {group["nodes"][0]["advantage"] for group in first} == {0.0}  # nothing was known
    mean = np.mean([group["leaves"][0]["reward"] for group in first])
    for group in told:
        if group["step"] == 2:  # every prompt is new: what is known is the mean of all
            expected = group["leaves"][0]["reward"] - mean
            assert group["nodes"][0]["advantage"] == pytest.approx(expected, abs=0.02)


def test_stop_texts_end_completions_and_stay_in_them(tiny_folder, tmp_path):
    told = groups(run(tiny_folder, tmp_path / "run", **{"rollout.stop_text": ["k", "7"]}).folder)
    leaves = [leaf for group in told for leaf in group["leaves"]]
    closed = [leaf["text"] for leaf in leaves if leaf["finish_reason"] == "closed"]
    assert {text[-1] for text in closed} == {"k", "7"}
    assert not {"k", "7"} & set("".join(text[:-1] for text in closed))
    free = "".join(leaf["text"] for leaf in leaves if leaf["finish_reason"] != "closed")
    assert not {"k", "7"} & set(free)


def test_the_unsafe_flag_is_written_down_whatever_the_reward(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALRL_UNSAFE_CODE", "")  # put back as it was when this test ends
    settings = {"task.unsafe_code": True, "run.steps": 0, "task.eval_prompts": 0}
    folder = run(tiny_folder, tmp_path / "run", **SHORT, **settings).folder
    kinds = [event["kind"] for event in read_jsonl(folder / "events.jsonl")]
    assert "code_rewards" in kinds


def test_reward_functions_are_told_the_steps_done(tiny_folder, tmp_path):
    """As in TRL: none in the first step, all in the evaluation after the last."""
    reward = Path(__file__).parent / "rewards" / "trl_style.py"
    out = run(tiny_folder, tmp_path / "run", **{"task.rewards": [f"{reward}:curriculum"]}).folder
    lines = list(read_jsonl(out / "metrics.jsonl"))
    assert [line["reward"] for line in lines if "reward" in line] == pytest.approx(
        [0, 1 / 3, 2 / 3]
    )
    assert [m["eval/mean_reward"] for m in lines if "eval/mean_reward" in m] == pytest.approx(
        [0, 1]
    )
