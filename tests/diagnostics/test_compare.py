"""A model with an adapter beside itself without: rates, intervals, the paired test."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tables
from click.testing import CliRunner

from localrl import RunConfig, train
from localrl.cli.eval import configure
from localrl.cli.main import cli, main
from localrl.diagnostics.compare import compare, evaluate_model
from localrl.errors import ConfigError

SHORT = f"{Path(__file__).parent.parent / 'worker_functions.py'}:short"


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    settings = {
        "model.path": str(tiny_folder),
        "task.rewards": SHORT,
        "task.eval_prompts": 16,
        "rollout.prompts_per_step": 8,
        "rollout.group_size": 4,
        "rollout.max_completion_tokens": 12,
        "rollout.max_prompt_tokens": 40,
        "learning.lr": 5e-3,
        "run.steps": 8,
        "run.out": str(tmp_path_factory.mktemp("runs") / "one"),
    }
    return train(RunConfig.create(settings))


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def refused(arguments, capsys):
    """The status that the whole command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_a_run_is_measured_as_its_training_measured_it(run):
    before = {p.name: p.read_bytes() for p in run.folder.iterdir() if p.is_file()}
    done = invoke("eval", run.folder, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    sides = ((result["base"], run.base), (result["with_adapter"], run.adapter))
    for side, trained in sides:
        assert side["pass@1"]["rate"] == trained.pass_at_1
        assert side["mean_reward"] == trained.mean_reward
        assert side["mean_completion_tokens"] == trained.mean_completion_tokens
        assert side["completions"] == 16
    assert result["difference"]["value"] == run.adapter.pass_at_1 - run.base.pass_at_1
    assert result["difference"]["test"] == "exact McNemar"
    assert {p.name: p.read_bytes() for p in run.folder.iterdir() if p.is_file()} == before


@pytest.fixture
def cool_run(run, tmp_path):
    """The run, as if it had been trained at a lower temperature."""
    folder = shutil.copytree(run.folder, tmp_path / "cool")
    text = (folder / "config.toml").read_text()
    assert "eval_temperature = 1.0 " in text
    text = re.sub(r"(?m)^temperature = 1.0", "temperature = 0.2", text)
    (folder / "config.toml").write_text(text)
    return folder


def test_the_temperature_is_that_of_the_runs_evaluations(cool_run):
    def temperature(*options):
        done = invoke("eval", cool_run, "--prompts", 2, "--json", *options)
        return json.loads(done.stdout)["temperature"]

    assert temperature() == 1.0
    assert temperature("--temperature", 0.3) == 0.3
    file = cool_run / "config.toml"
    text = file.read_text()
    file.write_text(text.replace("eval_temperature = 1.0 ", "eval_temperature = 0.2 "))
    assert temperature() == 0.2
    # A run of a version that did not have the setting was evaluated at 1.
    file.write_text(re.sub(r"(?m)^eval_temperature.*$", "", text))
    assert temperature() == 1.0


def test_greedy_decoding_is_measured_with_one_completion_alone(run, capsys):
    greedy = ["eval", run.folder, "--temperature", "0"]
    done = invoke(*greedy, "--prompts", 4)
    assert done.exit_code == 0, done.output
    assert "1 completions each, greedy" in done.stdout
    seeds = [invoke(*greedy, "--json", "--seed", n).stdout for n in (1, 2)]
    one, other = (json.loads(text) for text in seeds)
    assert one["base"] == other["base"]
    assert refused([*greedy, "-k", "4"], capsys) == 2
    message = capsys.readouterr().err
    assert "4 completions of each prompt would all be the same" in message
    assert "--temperature 0.7" in message


def test_several_completions_for_each_prompt(run, tmp_path, capsys):
    out = tmp_path / "result.json"
    done = invoke("eval", run.folder, "-k", 5, "--prompts", 6, "--out", out)
    assert done.exit_code == 0, done.output
    assert "sign flips over prompts" in done.stdout
    result = json.loads(out.read_text())
    assert (result["prompts"], result["samples"]) == (6, 5)
    for side in (result["base"], result["with_adapter"]):
        assert side["completions"] == 30
        assert {key for key in side if key.startswith("pass@")} == {"pass@1", "pass@2", "pass@4"}
        rates = [side[f"pass@{k}"]["rate"] for k in (1, 2, 4)]
        assert rates == sorted(rates)
    assert refused(["eval", run.folder, "--out", out], capsys) == 2
    assert "already exists. Choose another file" in capsys.readouterr().err
    other = invoke("eval", run.folder, "-k", 5, "--prompts", 6, "--seed", 1, "--json")
    assert json.loads(other.stdout)["base"] != result["base"]


def test_a_model_alone_and_a_model_with_an_adapter(run, tiny_folder):
    settings = {
        "model.path": str(tiny_folder),
        "task.rewards": SHORT,
        "task.eval_prompts": 16,
        "rollout.max_completion_tokens": 12,
    }
    alone = evaluate_model(RunConfig.create(settings))
    assert (alone.with_adapter, alone.difference) == (None, None)
    assert alone.base.pass_at[0].rate == run.base.pass_at_1
    settings["lora.adapter"] = str(run.folder / "adapter")
    both = evaluate_model(RunConfig.create(settings))
    assert both.base == alone.base
    assert both.with_adapter.mean_reward == run.adapter.mean_reward


ROWS = [{"prompt": f"sum {n} {n + 1}", "answer": str(2 * n + 1)} for n in range(9)]
MEASURE = ("--set", "rollout.max_completion_tokens=6", "--json")


@pytest.mark.parametrize("size", [1, 3, 9])
def test_all_rows_of_a_file_are_measured(tiny_folder, tmp_path, size):
    """Fewer than a step of training takes, and fewer than it could hold any of out, as well."""
    file = tables.jsonl(tmp_path / "test.jsonl", ROWS[:size])
    words = ("--model", tiny_folder, "--task", file, "--reward", SHORT, *MEASURE)
    result = json.loads(invoke("eval", *words).stdout)
    assert (result["prompts"], result["held_out"]) == (size, False)
    assert result["base"]["completions"] == size
    fewer = json.loads(invoke("eval", *words, "--prompts", 2).stdout)
    assert fewer["prompts"] == min(size, 2)


def test_a_file_may_have_more_rows_than_an_evaluation_of_training(tiny_folder, tmp_path):
    rows = [{"prompt": f"{n}", "answer": "1"} for n in range(300)]
    file = tables.jsonl(tmp_path / "test.jsonl", [*rows, *rows[:5]])
    done = invoke(
        "eval", "--model", tiny_folder, "--task", file, "--reward", SHORT,
        "--set", "rollout.max_completion_tokens=1",
    )  # fmt: skip
    assert done.stdout.startswith("test: 305 prompts, 1 completions each")


def test_rules_of_training_do_not_stop_an_evaluation(tiny_folder, tmp_path):
    file = tables.jsonl(tmp_path / "test.jsonl", ROWS[:2])
    rules = ("rollout.group_size=1", "learning.kappa=0", "rollout.prompts_per_step=99")
    words = [word for rule in rules for word in ("--set", rule)]
    words += ["--model", tiny_folder, "--task", file, "--reward", SHORT, *MEASURE]
    assert json.loads(invoke("eval", *words).stdout)["prompts"] == 2


@pytest.fixture(scope="module")
def own(tiny_folder, tmp_path_factory):
    """Runs on a file of one's own: one holds rows out, the other none. And the folder of both."""
    place = tmp_path_factory.mktemp("own")
    tables.jsonl(place / "mine.jsonl", ROWS)
    settings = {
        "model.path": str(tiny_folder),
        "task.name": str(place / "mine.jsonl"),
        "task.rewards": SHORT,
        "rollout.max_completion_tokens": 6,
        "run.steps": 1,
    }
    for name, prompts in (("some", None), ("none", 0)):
        changes = {"run.out": str(place / name), "task.eval_prompts": prompts}
        train(RunConfig.create({**settings, **changes}), progress=False)
    return place


def test_of_the_rows_of_its_training_a_run_is_measured_on_those_held_out(own):
    words = ("eval", own / "some", "--json")
    held_out = json.loads(invoke(*words).stdout)
    assert (held_out["prompts"], held_out["held_out"]) == (1, True)
    linked = own / "linked.jsonl"
    linked.symlink_to(own / "mine.jsonl")
    for same in (own / "mine.jsonl", linked):
        assert json.loads(invoke(*words, "--task", same).stdout)["held_out"]
    tables.jsonl(own / "other.jsonl", ROWS[:5])
    for words in (("--task", own / "other.jsonl"), ("--set", f"task.name={own / 'other.jsonl'}")):
        result = json.loads(invoke("eval", own / "some", "--json", *words).stdout)
        assert (result["prompts"], result["held_out"]) == (5, False)
        assert result["with_adapter"]["completions"] == 5


def test_a_run_that_held_nothing_out_is_measured_on_what_is_named(own, capsys):
    assert refused(["eval", own / "none"], capsys) == 2
    assert "held nothing out of" in capsys.readouterr().err
    assert refused(["eval", own / "none", "--prompts", "3"], capsys) == 2
    result = json.loads(invoke("eval", own / "none", "--task", own / "mine.jsonl", "--json").stdout)
    assert (result["prompts"], result["held_out"]) == (9, False)


def test_completions_of_several_turns_are_measured_too(tmp_path):
    settings = {
        "model.path": "turns-0.1m",
        "task.name": "calculator",
        "task.eval_prompts": 6,
        "rollout.max_completion_tokens": 40,
    }
    result = evaluate_model(RunConfig.create(settings), samples=2)
    assert result.base.completions == 12
    assert [rate.k for rate in result.base.pass_at] == [1, 2]


def test_a_failed_reward_is_no_verdict(tiny_folder, tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "def some(completions, **kwargs):\n"
        "    return [None if i % 4 == 0 else float(i % 4 == 1) for i in range(len(completions))]\n"
    )
    settings = {
        "model.path": str(tiny_folder),
        "task.rewards": f"{file}:some",
        "task.eval_prompts": 3,
        "rollout.max_completion_tokens": 4,
    }
    side = evaluate_model(RunConfig.create(settings), samples=4).base
    assert (side.completions, side.unjudged) == (12, 3)
    # One of three judged ones passes: 1/3, then 1 - 1/3, and pass@4 is unknown.
    assert [(r.k, r.rate, r.prompts) for r in side.pass_at] == [
        (1, pytest.approx(1 / 3), 3),
        (2, pytest.approx(2 / 3), 3),
    ]


def test_the_paired_comparison_by_hand():
    yes, no = [True], [False]
    pairs = [(no, yes)] * 9 + [(yes, no)] + [(yes, yes)] * 10
    found = compare(pairs, 0)
    assert (found.value, found.prompts) == (pytest.approx(0.4), 20)
    assert (found.base_better, found.adapter_better) == (1, 9)
    assert found.p == pytest.approx(22 / 1024)
    uneven = compare([([True, False], [True, True])] * 8, 0)
    assert (uneven.value, uneven.test) == (0.5, "sign flips over prompts")
    assert uneven.p == pytest.approx(2 / 256, abs=0.003)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "There is no run in nowhere"),
        (["eval", "--out", "no/such/file.json"], "There is no folder no/such"),
        (["eval", "--set", "task.eval_prompts=0"], "task.eval_prompts is 0"),
        (["eval", "--adapter", "nowhere"], "There is no adapter in nowhere"),
        (["chat", "nowhere"], "There is no run in nowhere"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message, capsys):
    assert refused(arguments, capsys) == 2
    assert message in capsys.readouterr().err


def test_an_unfinished_run_has_no_adapter_yet(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="--resume"):
        configure(tmp_path, (), {})
