"""`localrl plan`: its table of models, and what it says of the time."""

from __future__ import annotations

import json
import shutil

import pytest
import within

from localrl.embedded import embedded_model_path
from localrl.memory.known_models import known_names
from localrl.training import model_choice


def rows(text):
    """Rows of the table by the name of their model."""
    table = text.split("where\n")[1].split("\n\n")[0].splitlines()
    return {line.split()[0]: line for line in table}


def plan(capfd, tmp_path, *words):
    done = within.localrl(capfd, "plan", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_known_model_is_ranked_for_a_mac(capfd, tmp_path):
    text = plan(capfd, tmp_path, "--models", "--mac", "16")
    assert max(map(len, text.splitlines())) <= 80
    table = rows(text)
    names = {name.rpartition("/")[2] for name in known_names()}
    assert set(table) == names | {"steps-0.8m", "turns-0.1m", "smollm2-135m"}
    order = list(table)
    assert order.index("Qwen3-4B") < order.index("Qwen3-1.7B") < order.index("steps-0.8m")
    assert order.index("steps-0.8m") < order.index("Qwen3-8B")
    assert "does not fit" in table["Qwen3-8B"]
    assert "does not fit" not in table["Qwen3-4B"]
    assert table["steps-0.8m"].endswith("embedded")
    assert table["smollm2-135m"].endswith("index")
    best = f"mlx-community/{order[0]}-4bit"
    assert f"next: localrl plan --model {best} --mac 16\n      localrl pull {best}" in text


def test_a_larger_mac_lets_larger_models_reach_the_settings(capfd, tmp_path):
    text = plan(capfd, tmp_path, "--models", "--mac", "32")
    assert "does not fit" not in rows(text)["Qwen3-8B"]


def test_models_that_give_something_up_come_after_those_that_do_not(capfd, tmp_path):
    wish = ("--set", "rollout.group_size=16", "--set", "rollout.max_completion_tokens=4096")
    text = plan(capfd, tmp_path, "--models", "--mac", "8", "--json", *wish)
    models = json.loads(text)["models"]
    marks = [(one["fits"], one["reaches_settings"]) for one in models]
    assert marks == sorted(marks, reverse=True)
    assert set(marks) == {(True, True), (True, False), (False, False)}
    reduced = next(one for one in models if one["fits"] and not one["reaches_settings"])
    given = reduced["plan"]
    assert (given["group_size"], given["max_completion_tokens"]) != (16, 4096)
    refused = models[-1]
    assert refused["plan"] is None
    assert "--memory-limit" in refused["problem"]


def test_eight_bits_take_more_than_four(capfd, tmp_path):
    def stored(*words):
        text = plan(capfd, tmp_path, "--models", "--mac", "64", "--json", *words)
        return {one["model"]: one["weight_bytes"] for one in json.loads(text)["models"]}

    four, eight = stored(), stored("--quantize", "8")
    small, large = four["mlx-community/Qwen3-4B-4bit"], eight["mlx-community/Qwen3-4B-8bit"]
    assert small == pytest.approx(4_022_468_096 * 4.5 / 8, rel=0.01)
    assert large == pytest.approx(4_022_468_096 * 8.5 / 8, rel=0.01)


def cached(home, name):
    """Put the embedded model into the Hub's cache under another name."""
    folder = home / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    shutil.copytree(embedded_model_path(), snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")


def test_models_in_the_cache_of_the_hub_are_marked(capfd, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "mlx-community/Qwen3-0.6B-4bit")
    cached(tmp_path, "Qwen/Qwen3-1.7B")
    text = plan(capfd, tmp_path, "--models", "--mac", "16", "--json")
    found = {one["model"]: one for one in json.loads(text)["models"]}
    assert found["mlx-community/Qwen3-0.6B-4bit"]["source"] == "here"
    assert found["mlx-community/Qwen3-4B-4bit"]["source"] == "Hub"
    whole = found["Qwen/Qwen3-1.7B"]  # as it is on this machine, to be quantised when loaded
    assert (whole["source"], whole["quantize"]) == ("here", 4)
    assert "mlx-community/Qwen3-1.7B-4bit" not in found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "x"), "Remove --model x"),
        (("--set", "lora.keys=nowhere"), "lora.keys contains 'nowhere'"),
        (("--memory-limit", "1XB"), "memory.limit is '1XB'"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(capfd, tmp_path, words, told):
    done = within.localrl(capfd, "plan", "--models", "--mac", "16", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_family_without_the_named_layers_is_left_out(tmp_path):
    from localrl.memory.machine import mac

    found = model_choice.rank({"lora.keys": ["self_attn.qkv_proj"]}, None, mac(16))
    assert {one.title for one in found} == {"Phi-4-mini-instruct"}


def test_the_rewards_of_train_are_taken(capfd, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "say", "answer": "a"}\n' * 20)
    words = ("--task", "data.jsonl", "--reward", "exact_match")
    text = plan(capfd, tmp_path, *words, "--set", "task.eval_prompts=4")
    assert "task     prompts of up to" in text


def test_the_time_is_that_of_the_last_run_here(capfd, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = (
        "--set", "rollout.prompts_per_step=2", "--set", "rollout.max_completion_tokens=4",
        "--set", "task.eval_prompts=2", "--steps", "4",
    )  # fmt: skip
    model = ("--model", tiny_folder)
    first = plan(capfd, tmp_path, *model, *sizes[:6])
    assert "time     not known yet" in first
    assert "tokens   at most 16 a step, 1,600 in 100 steps" in first
    done = within.localrl(
        capfd, "train", *model, *sizes, "--no-supervise", "--out", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "time     not known yet" in done.stderr
    words = [*model, *sizes[:6]]
    assert "at the speed of the last run of this model here" in plan(capfd, tmp_path, *words)
    found = json.loads(plan(capfd, tmp_path, *words, "--json"))
    assert found["expected_seconds"] > 0
    elsewhere = plan(capfd, tmp_path, *words, "--mac", "16")
    assert "time     not known: measured where it runs" in elsewhere
    assert json.loads(plan(capfd, tmp_path, *words, "--mac", "16", "--json"))[
        "expected_seconds"
    ] is None  # fmt: skip
