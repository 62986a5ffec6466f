"""Supervised runs: the loss and its gradient, exact resume, where completions come from, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import within
from steps import plan, relative_difference

from localrl.backend import mx, nn
from localrl.cli.sft import _resolve
from localrl.config import RunConfig
from localrl.engines.choose import choose_engine
from localrl.errors import CheckpointError, ConfigError, DataError, Stopped
from localrl.export.card import Address, make_card
from localrl.export.facts import read_facts
from localrl.learning.objectives import SUPERVISED, denominator
from localrl.learning.selection import select
from localrl.learning.update import Updater
from localrl.policy.tokenizer import load_tokenizer
from localrl.processes.heartbeat import Heartbeat
from localrl.report.reading import read_run
from localrl.report.verdict import verdict
from localrl.rewards.catalog import parse_rewards
from localrl.runs.logs import read_jsonl
from localrl.settings import LearningConfig, TaskConfig
from localrl.tasks.demonstrations import load_demonstrations
from localrl.tasks.loading import open_task
from localrl.train import train
from localrl.training.demonstrations import full_credit, open_demonstrations
from localrl.training.session import NullProgress
from localrl.training.supervised_settings import as_supervised

SMALL = {
    "task.name": "none",
    "rollout.prompts_per_step": 4,
    "rollout.max_prompt_tokens": 40,
    "rollout.max_completion_tokens": 24,
    "learning.lr": 1e-2,
    "learning.warmup_steps": 0,
    "run.steps": 4,
}
ROWS = [
    {"prompt": "sum 1 2", "completion": "3"},
    {"prompt": "sum 20 30", "completion": [{"role": "assistant", "content": "it is 50"}]},
    {
        "messages": [
            {"role": "user", "content": "sum 2 2"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "and 1"},
            {"role": "assistant", "content": "that makes 5"},
        ]
    },
]
MANY = [{"prompt": f"sum {a} {b}", "completion": str(a + b)} for a in range(5) for b in range(4)]


def written(folder: Path, rows) -> str:
    file = folder / "worked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(model, data, out, **changes):
    settings = {"model.path": str(model), "task.demonstrations": data, "run.out": str(out)}
    return RunConfig.create({**settings, **SMALL, **changes})


def demonstrations(model, tokenizer, folder, rows, **changes):
    wish = config(model, written(folder, rows), folder / "run", **changes)
    return open_demonstrations(wish, Path(model), None, tokenizer)  # type: ignore[arg-type]


def cross_entropy(policy, groups):
    """The mean over the model's tokens of whole rows, each alone with full logits, by autodiff."""

    def loss():
        total, count = mx.array(0.0), 0
        for group in groups:
            [node], prompt = group.nodes, list(group.prompt_ids)
            tokens = mx.array([prompt + node.token_ids.tolist()])
            logits = policy.model(tokens[:, :-1])[0, len(prompt) - 1 :].astype(mx.float32)
            each = nn.losses.cross_entropy(logits, tokens[0, len(prompt) :])
            total = total + (each * mx.array(node.sampled)).sum()
            count += int(node.sampled.sum())
        return total / count

    return nn.value_and_grad(policy.model, loss)()


def test_the_gradient_is_that_of_cross_entropy_however_it_is_packed(tmp_path, engine):
    model = tmp_path / "model"
    policy = tiny.make_tiny_policy(model)
    if engine == "cpu":
        policy = choose_engine(policy, "cpu")
    assert policy.engine.name == engine
    found = demonstrations(model, policy.tokenizer, tmp_path, ROWS, **{"task.eval_prompts": 0})
    scored = found.groups(found.training, 0)
    groups = [one.group for one in scored]
    value, expected = cross_entropy(policy, groups)
    credits = [full_credit(group) for group in groups]
    z = denominator(SUPERVISED, scored, credits, 24)
    assert z == sum(int(group.nodes[0].sampled.sum()) for group in groups)
    batch = select(scored, credits, z, SUPERVISED).batch
    for shared in (True, False):
        for micro_rows in (1, 2, 100):
            updater = Updater(policy, LearningConfig(), 1.0, supervised=True)
            updater.gradient.shared = shared
            gradient, total = updater.gradient(batch, plan(micro_rows))
            assert relative_difference(gradient, expected) < 1e-5
            assert total.loss / z == pytest.approx(value.item(), rel=1e-5)


def test_no_token_but_the_assistants_counts(tmp_path):
    policy = tiny.make_tiny_policy(tmp_path / "model")
    found = demonstrations(
        tmp_path / "model", policy.tokenizer, tmp_path, ROWS, **{"task.eval_prompts": 0}
    )
    scored = found.groups(found.training, 0)
    credits = [full_credit(one.group) for one in scored]
    batch = select(scored, credits, 1.0, SUPERVISED).batch
    told = ["".join(np.array(policy.tokenizer.pieces(n.token_ids.tolist()))[n.trained])
            for n in batch.nodes]  # fmt: skip
    assert told == ["3<end>", "it is 50<end>", "4<end>that makes 5<end>"]


class StopsAfter(NullProgress):
    """Asks the run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.heartbeat = step, Heartbeat()

    def stepped(self, metrics) -> None:
        if metrics["step"] == self.step:
            self.heartbeat.stop("the test says so")


def outcome(out: Path):
    untimed = ("time/", "memory/", "step_time")
    metrics = [
        {k: v for k, v in line.items() if not k.startswith(untimed)}
        for line in read_jsonl(out / "metrics.jsonl")
    ]
    files = [(out / name).read_bytes() for name in ("adapter/adapters.safetensors", "eval.json")]
    return metrics, files, (out / "rollouts.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory, engine):
    """An uninterrupted run on all rows but those held out, with its data."""
    folder = tmp_path_factory.mktemp("whole")
    data, settings = written(folder, MANY), {"model.engine": engine, "run.eval_every": 2}
    train(config(tiny_folder, data, folder / "run", **settings), progress=False)
    return folder / "run", data, settings


@pytest.mark.exact
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny_folder, tmp_path, whole):
    out, data, settings = whole
    same = config(tiny_folder, data, tmp_path / "run", **settings)
    stops = StopsAfter(3)
    with pytest.raises(Stopped):
        train(same, progress=stops, heartbeat=stops.heartbeat)
    train(same, resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(out)


def test_a_run_tells_its_losses_and_the_report_shows_them(whole):
    lines = list(read_jsonl(whole[0] / "metrics.jsonl"))
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    steps = [line for line in lines if "loss" in line]
    assert losses[0] > losses[1] > losses[2]
    assert steps[0]["loss"] > steps[-1]["loss"]
    for name in ("reward", "entropy", "sampling/sampling_logp_difference/mean"):
        assert steps[0][name] is None
    told = verdict(read_run(whole[0]))
    assert told == f"Held-out loss {losses[0]:.3f} before, {losses[-1]:.3f} after."
    assert json.loads((whole[0] / "eval.json").read_text())["adapter"]["loss"] == losses[-1]
    [event] = [e for e in read_jsonl(whole[0] / "events.jsonl") if e["kind"] == "objective"]
    assert (event["name"], event["ratio"], event["length"]) == ("supervised", "none", "step")


def test_changed_data_are_another_run(tiny_folder, tmp_path):
    data = written(tmp_path, MANY)
    same = config(tiny_folder, data, tmp_path / "run", **{"run.steps": 1})
    train(same, progress=False)
    written(tmp_path, [{**row, "completion": row["completion"] + "0"} for row in MANY])
    with pytest.raises(CheckpointError, match="worked examples of this run has changed"):
        train(same.replace("run.steps", 2), resume=True, progress=False)


HIGH = f"{Path(__file__).parent.parent / 'worker_functions.py'}:even"


@pytest.fixture(scope="module")
def sampled(tiny_folder, tmp_path_factory):
    """A run of which some completions succeed: those with an even number of tokens."""
    folder = tmp_path_factory.mktemp("sampled")
    settings = {
        "model.path": str(tiny_folder),
        "task.name": "sums",
        "task.train_prompts": 12,
        "task.eval_prompts": 2,
        "task.rewards": [HIGH],
        "rollout.prompts_per_step": 6,
        "rollout.group_size": 4,
        "rollout.max_completion_tokens": 12,
        "rollout.max_prompt_tokens": 40,
        "run.steps": 2,
        "run.out": str(folder / "run"),
    }
    return train(RunConfig.create(settings), progress=False).folder


def test_a_runs_own_successes_are_learned_in_its_own_tokens(sampled, tmp_path, capfd):
    done = within.localrl(
        capfd, "sft", "--from-rollouts", sampled, "--steps", 2, "--out", tmp_path / "run",
        "--no-supervise", "--set", "rollout.prompts_per_step=4", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "completions in 12 groups are successful" in done.stderr
    assert "measured on sums" in done.stderr
    assert "before training: pass@1" in done.stderr
    right = {
        (*record["prompt_ids"], -1, *node["token_ids"])
        for record in read_jsonl(sampled / "rollouts.jsonl")
        for leaf in record["leaves"]
        if leaf["reward"] == 1.0
        and leaf["finish_reason"] == "stop"
        and (node := record["nodes"][leaf["node"]])
    }
    learned = {
        (*record["prompt_ids"], -1, *record["nodes"][0]["token_ids"])
        for record in read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    }
    assert learned
    assert learned <= right


def test_completions_are_taken_in_tokens_of_the_same_model_alone(sampled, tmp_path):
    other = tiny.make_folder(tmp_path / "other", extra=("sum",))
    with pytest.raises(ConfigError, match=r"tokens of its model, .*tokenizer.json of .* differs"):
        train(config(other, str(sampled), tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_without_successes_is_refused(sampled, tiny_folder, tmp_path):
    (tmp_path / "none").mkdir()
    for name in ("run.json", "config.toml"):
        (tmp_path / "none" / name).write_bytes((sampled / name).read_bytes())
    with pytest.raises(ConfigError, match="There are no rollouts in"):
        train(config(tiny_folder, str(tmp_path / "none"), tmp_path / "run"), progress=False)
    lines = list(read_jsonl(sampled / "rollouts.jsonl"))
    for line in lines:
        for leaf in line["leaves"]:
            leaf["parts"] = {"even": 0.0}
    file = tmp_path / "none" / "rollouts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="is successful and whole: 0 of 48 passed"):
        train(config(tiny_folder, str(tmp_path / "none"), tmp_path / "run"), progress=False)


def test_training_goes_on_from_the_run_itself(whole, tiny_folder, tmp_path):
    settings = {
        "model.path": str(tiny_folder),
        "lora.adapter": str(whole[0]),
        "task.name": "sums",
        "task.eval_prompts": 2,
        "rollout.prompts_per_step": 2,
        "rollout.max_completion_tokens": 8,
        "run.steps": 0,
        "run.out": str(tmp_path / "run"),
    }
    train(RunConfig.create(settings), progress=False)
    one, other = (
        (folder / "adapter" / "adapters.safetensors").read_bytes()
        for folder in (whole[0], tmp_path / "run")
    )
    assert one == other


SAID = {"role": "assistant", "content": "3"}


def calling(calls):
    return {"prompt": "sum 1 2", "completion": [{**SAID, "tool_calls": calls}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "sum 1 2", "answer": "3"}, "line 2 has neither `messages` .*completion=COLUMN"),
        ({"prompt": "sum 1 2", "completion": 3}, "line 2: completion is 3; it must be text or"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2 has no message of the assist"),
        ({"messages": [SAID]}, "line 2: no message of the user comes before"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    SAID,
                    {"role": "user", "content": "b"},
                ]
            },
            "line 2: .* must begin and end with the assistant's, and a message of the user",
        ),
        ({"messages": [{"role": "user", "content": "a"}, SAID, SAID]}, "line 2: two messages of"),
        (
            {"messages": [{"role": "user", "content": "a"}, {**SAID, "content": " "}]},
            "line 2: content is ' '; it must be text",
        ),
        (
            {"prompt": "sum 1 5", "completion": "3" * 30},
            "line 2: the completion has 31 tokens, and 24 .*max_completion_tokens=31",
        ),
        (
            {"prompt": "1" * 60, "completion": "3"},
            "line 2: the prompt has 62 tokens, and 40 .*max_prompt_tokens=62",
        ),
        (calling("add(1, 2)"), r"line 2: tool_calls is 'add\(1, 2\)'; it must be a list"),
        (calling(["add"]), "line 2: tool_calls holds 'add'; a call needs a `function`"),
        (
            calling([{"function": {"name": "add", "arguments": "{bad"}}]),
            "line 2: the arguments of the call of 'add' are '{bad'; they must be an object",
        ),
        ({"prompt": "sum 1 4", "completion": "X3"}, "line 2: the model has no token for 'X'"),
    ],
)
def test_a_row_that_cannot_be_learned_ends_it_before_the_run(tiny_folder, tmp_path, row, message):
    tokenizer = load_tokenizer(tiny_folder)
    with pytest.raises(DataError, match=message):
        demonstrations(tiny_folder, tokenizer, tmp_path, [ROWS[0], row])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name what to learn from"),
        (("worked.jsonl", "--from-rollouts", "RUN"), "Choose one to learn from"),
        (("--from-rollouts", "nowhere"), "There is no run in nowhere"),
        (("worked.jsonl", "--set", "rollout.group_size=4"), "group_size has no effect in a superv"),
        (("worked.jsonl", "--set", "loss_type=grpo"), "learning.objective has no effect in a sup"),
        (("worked.jsonl", "--set", "task.decided=a.py:f"), "task.decided has no effect in a super"),
        (
            ("worked.jsonl", "--set", "task.filter_overlong_prompts=true"),
            "task.filter_overlong_prompts has no effect",
        ),
        (("worked.jsonl", "--reward", "exact"), "task.rewards has no effect in a supervised run"),
        (("worked.jsonl", "--set", "task.agent=a.py:play"), "task.agent has no effect in a superv"),
    ],
)
def test_the_command_refuses_what_means_nothing(tmp_path, capfd, words, message):
    done = within.localrl(capfd, "sft", *words, "--print-config", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_step_has_an_example_for_each_mini_batch(sampled, tiny_folder, tmp_path):
    wish = config(tiny_folder, str(sampled), tmp_path / "run", **{"learning.minibatches": 99})
    with pytest.raises(ConfigError, match="minibatches is 99, but a step has"):
        train(wish, progress=False)
    assert not (tmp_path / "run").exists()


def test_train_refuses_the_same_and_the_demonstrations_own_settings_are_fine(tmp_path):
    settings = {"task.demonstrations": "worked.jsonl", "run.out": str(tmp_path / "run")}
    wish = RunConfig.create({**settings, "rollout.group_size": 8})
    with pytest.raises(ConfigError, match=r"group_size has no effect .* and is 8"):
        train(wish, progress=False)
    supervised = as_supervised(RunConfig.create(settings))
    assert (supervised.task.train_prompts, supervised.rollout.group_size) == (256, 1)
    assert as_supervised(supervised) == supervised


def test_settings_that_evaluations_sample_with_are_taken_from_the_run(sampled, tmp_path):
    changed = RunConfig.of_run(sampled / "config.toml")
    sampling = {"rollout.max_turns": 3, "rollout.stop_text": ("8",), "rollout.temperature": 0.7}
    for key, value in {**sampling, "rollout.group_size": 4, "task.decided": "a.py:f"}.items():
        changed = changed.replace(key, value)
    (tmp_path / "config.toml").write_text(changed.to_toml())
    (tmp_path / "run.json").write_bytes((sampled / "run.json").read_bytes())
    taken = _resolve({"task.demonstrations": str(tmp_path)}, data=None, run=str(tmp_path))
    assert {key: taken.value(key) for key in sampling} == sampling
    assert (taken.task.name, taken.task.decided) == ("sums", None)


def test_the_column_of_completions_is_only_the_worked_examples(tmp_path):
    for name, column in (("worked", "solution"), ("eval", "answer")):
        rows = [{"question": f"sum {n} 1", column: str(n + 1)} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wish = TaskConfig(
        name=str(tmp_path / "eval.jsonl"),
        demonstrations=str(tmp_path / "worked.jsonl"),
        columns=("prompt=question", "completion=solution"),
    )
    worker: Any = None  # only for Python files
    measured = open_task(wish, parse_rewards(["accuracy"]), worker)
    assert [example.answer for example in measured.evaluation(1)] != [None]
    assert load_demonstrations(wish, worker).training


def test_the_card_of_a_run_says_how_it_learned_and_not_from_where(whole):
    card = make_card(read_facts(whole[0]), Address("me/tiny", "acme/base", None))
    assert "or a quantised copy on worked examples with localrl" in card
    assert "Loss per token of held-out worked examples, before and after: " in card
    assert "learning.lr" in card
    assert not any(word in card for word in ("grpo", "learning.objective", "worked.jsonl"))
