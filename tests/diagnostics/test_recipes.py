"""A published comparison: every arm a run of its own, made once, with one table at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import within

from localrl.cli.recipe import RESULTS
from localrl.config import RunConfig
from localrl.diagnostics.recipe_runs import Changes, plan, write_settings
from localrl.diagnostics.recipes import RECIPES
from localrl.errors import ConfigError, Stopped
from localrl.processes.heartbeat import Heartbeat
from localrl.report.reading import read_run
from localrl.train import train
from localrl.training.session import NullProgress

RECIPE = RECIPES["gsm8k-cppo"]
SMALL = {
    "task.eval_prompts": 2,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 4,
    "memory.dequantise": "off",
    "run.checkpoint_every": 1,
}
ITEMS = ("pens", "cups", "eggs", "pins", "nuts", "figs", "caps", "keys", "maps", "bags", "jars")


def rows() -> list[dict]:
    """Problems in GSM8K's form."""
    return [
        {
            "question": f"Ada has {n} {item} and buys {m} more. How many does she have?",
            "answer": f"She has {n} + {m} = <<{n}+{m}={n + m}>>{n + m} {item}.\n#### {n + m}",
        }
        for n, item in enumerate(ITEMS, start=2)
        for m in (3, 4)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that writes plain English, and problems."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny.make_folder(folder / "model", characters=tiny.PRINTABLE, vocab_size=128)
    lines = [json.dumps(row) + "\n" for row in rows()]
    (folder / "problems.jsonl").write_text("".join(lines))
    return folder


def words(settings: dict) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


class StopAfterFirst(NullProgress):
    """Asks a run to stop once it has made a step."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()

    def stepped(self, metrics) -> None:
        self.heartbeat.stop("the test")


@pytest.mark.parametrize("name", RECIPES)
def test_every_arm_can_be_configured_and_sees_each_problem_once(name, tmp_path):
    recipe = RECIPES[name]
    runs = plan(recipe, Changes(tmp_path))
    assert [run.name for run in runs] == list(recipe.arms)
    for run in runs:
        config = RunConfig.create(run.settings)
        assert RunConfig.create({}, _written(tmp_path, config)) == config
        prompts = config.run.steps * config.rollout.prompts_per_step
        assert 0 <= prompts - recipe.problems < config.rollout.prompts_per_step
        assert run.completions == prompts * config.rollout.group_size
        assert not run.begun


def _written(folder: Path, config: RunConfig) -> Path:
    (folder / "arm.toml").write_text(config.to_toml())
    return folder / "arm.toml"


def test_the_published_figures_are_those_of_the_paper():
    grpo, *pruned = RECIPE.published[1:]
    speedups = [round(grpo.seconds / line.seconds, 2) for line in pruned]
    assert speedups == [1.81, 3.27, 4.89, 8.32]


def test_a_stopped_comparison_goes_on_and_is_made_once(place, capfd):
    """Both runs are real processes; the first was stopped before, after one step."""
    model, problems = str(place / "model"), str(place / "problems.jsonl")
    runs = plan(RECIPE, Changes(place / "out", model, problems, 3, SMALL))
    write_settings(runs[0])
    progress = StopAfterFirst()
    config = RunConfig.create(file=runs[0].file)
    with pytest.raises(Stopped):
        train(config, progress=progress, heartbeat=progress.heartbeat)
    arguments = ["bench", "--recipe", "gsm8k-cppo", "--model", model, "--problems", 3]
    arguments += ["--data", problems, "--out", place / "out", *words(SMALL)]
    done = within.localrl(capfd, *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "run 1 of 2: GRPO-16, up to 6 completions" in done.stdout
    table = done.stdout.partition("measured here\n")[2].splitlines()
    assert table[0].split()[:2] == ["GRPO-16", "0.00"]
    assert table[1].split()[:2] == ["pairs", "0.00"]
    assert "80.41" in done.stdout.partition("published: arXiv 2503.22342v1")[2]
    read = [read_run(run.folder) for run in runs]
    assert [[step["step"] for step in run.steps] for run in read] == [[1, 2, 3], [1]]
    kept = json.loads((place / "out" / RESULTS).read_text())
    assert [line["arm"] for line in kept["results"]] == list(RECIPE.arms)
    assert kept["results"][0]["tokens"] == sum(step["rollout/tokens"] for step in read[0].steps)

    before = {run.folder: (run.folder / "metrics.jsonl").stat().st_mtime_ns for run in runs}
    again = within.localrl(capfd, *arguments, cwd=place)
    assert again.stdout.partition("measured here\n")[2].splitlines()[:2] == table[:2]
    assert "pairs, done" in again.stdout
    assert all((f / "metrics.jsonl").stat().st_mtime_ns == time for f, time in before.items())

    other = within.localrl(capfd, *arguments, "--set", "run.seed=1", cwd=place)
    assert other.returncode == 2
    assert "has run.seed = 0, not 1" in other.stderr


def test_what_is_missing_is_told_before_anything_runs(place, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    bench = ("bench", "--recipe", "gsm8k-cppo", "--out", tmp_path / "out")
    done = within.localrl(capfd, *bench, cwd=tmp_path)
    assert done.returncode == 2
    assert "localrl pull --data openai/gsm8k:main" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--recipe", "gsm8k-cppo", "--data", "x.jsonl"), "Say it with --problems"),
        (("--recipe", "gsm8k-cppo", "--set", "task.eval_prompts=0"), "cannot be 0 here"),
        (("--recipe", "gsm8k-cppo", "--set", "run.out=x"), "Name the one around them with --out"),
        (("--recipe", "gsm8k-cppo", "--rows", "2"), "--recipe has no use for --rows"),
        (("--recipe", "gsm8k-cppo", "--json"), "--recipe has no use for --json"),
        (("--problems", "2"), "--problems needs --recipe"),
        (("--set", "run.seed=1"), "--set needs --recipe"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, told, tmp_path, capfd):
    done = within.localrl(capfd, "bench", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_second_recipe_is_a_few_lines(tmp_path):
    other = replace(RECIPE, model="mine", arms={"one": {"rollout.prompts_per_step": 4}}, problems=9)
    [run] = plan(other, Changes(tmp_path, problems=5))
    assert run.settings["run.steps"] == 2
    assert run.settings["model.path"] == "mine"
    with pytest.raises(ConfigError, match="group_size"):
        plan(other, Changes(tmp_path, settings={"rollout.group_size": -1}))
