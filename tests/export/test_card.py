"""The model card: made from the run folder alone, by allow-lists."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from huggingface_hub import ModelCard

from localrl.config import RunConfig
from localrl.errors import ConfigError, DataError
from localrl.export.card import Address, Sample, fence, make_card, plot
from localrl.export.facts import SETTINGS, HeldOutResult, read_facts

ADDRESS = Address("me/tiny", "acme/base", None)


@pytest.fixture
def run(tmp_path):
    """A run folder by hand, and a function that writes a file of it again."""

    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        return tmp_path

    config = RunConfig.create({"task.name": "sums", "run.seed": 7, "learning.lr": 2e-5})
    write("config.toml", config.to_toml())
    write("run.json", {"localrl": "0.1.0", "mlx": "0.32", "platform": "Linux-host", "user": "me"})
    write("plan.json", {"decode_rows": 32, "reason": "on my machine", "limit_bytes": None})
    before = {"n": 40, "pass@1": 0.25, "ci95": [0.1424, 0.4019], "mean_reward": 0.3}
    after = {"n": 40, "pass@1": 0.5, "ci95": [0.352, 0.648], "mean_reward": None}
    write("eval.json", {"task": "sums", "base": before, "adapter": after})
    rows = [
        {"step": 0, "eval/pass@1": 0.25},
        {"step": 1, "reward": 0.25, "memory/peak_bytes": 3 * 2**20},
        {"step": 2, "reward": None, "memory/peak_bytes": 5 * 2**20},
        {"step": 3, "reward": 0.75, "memory/peak_bytes": 4 * 2**20},
    ]
    write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return write


def test_a_card_says_what_the_run_was(run):
    card = make_card(read_facts(run("notes.txt", "x")), ADDRESS)
    for line in (
        "# tiny",
        "hf download me/tiny --local-dir tiny",
        'mlx_lm.generate --model acme/base --adapter-path tiny --prompt "your prompt"',
        'AutoPeftModelForCausalLM.from_pretrained("me/tiny")',
        "- Task: sums, built into localrl: add four to six two-digit numbers (levels 4 to 6)",
        "- Reward: the task's own",
        "| base | 40 | 0.250 | 0.142 to 0.402 | 0.300 |",
        "| with the adapter | 40 | 0.500 | 0.352 to 0.648 | unknown |",
        "Mean reward of 2 steps.",
        "| `learning.lr` | 2e-05 |",
        "| `run.seed` | 7 |",
        "Peak memory held by MLX: 5 MiB.",
        "| `decode_rows` | 32 |",
        "| `mlx` | 0.32 |",
    ):
        assert line in card
    for kept in ("Linux-host", "on my machine", "platform", "limit_bytes", "unsafe_code"):
        assert kept not in card


def test_the_hub_reads_the_metadata(run):
    data = ModelCard(make_card(read_facts(run("notes.txt", "x")), ADDRESS)).data.to_dict()
    assert data["base_model"] == "acme/base"
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert "mlx" not in data["tags"]
    result = data["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "sums"
    assert result["metrics"] == [{"type": "pass@1", "value": 0.5}]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("sums", "sums"),
        ("countdown:2-4", "countdown:2-4"),
        ("my secrets.jsonl", "own data"),
        ("secrets", "own data"),
        ("/home/me/steps", "own data"),
        ("task.py", "own data"),
    ],
)
def test_only_built_in_tasks_are_named(run, name, task):
    config = RunConfig.create({"task.name": name}).to_toml()
    assert read_facts(run("config.toml", config)).task == task


def test_of_own_rewards_only_the_function_is_named(run):
    rewards = (
        "/home/me/secret.py:score",
        "accuracy",
        "regex(pattern='the secret')",
        "my.secret.module:judge(level=3)",
    )
    config = RunConfig.create({"task.name": "secret.jsonl", "task.rewards": rewards}).to_toml()
    assert read_facts(run("config.toml", config)).rewards == (
        "`score`, own function",
        "`accuracy_reward`, built into localrl",
        "`regex_reward`, built into localrl",
        "`judge`, own function",
    )


def test_no_setting_that_is_a_text_of_its_owner_is_shown(run):
    """Of the settings that are shown, those that are text have a list of values to choose from."""
    config = RunConfig()
    for key in SETTINGS:
        section, _, name = key.partition(".")
        found = {field.name: field for field in fields(getattr(config, section, config))}
        if name in found and "str" in str(found[name].type) and key != "lora.keys":
            assert found[name].metadata["choices"], key
    text = RunConfig.create({"task.system": "the secret", "rollout.stop_text": "</secret>"})
    strange = '[lora]\nkeys = ["a secret"]\nrank = "a secret"\n[rollout.rounds]\na = "secret"\n'
    for config in (text.to_toml(), strange):
        assert "secret" not in make_card(read_facts(run("config.toml", config)), ADDRESS)


def test_unsafe_code_is_told(run):
    config = RunConfig.create({"task.unsafe_code": True}).to_toml()
    card = make_card(read_facts(run("config.toml", config)), ADDRESS)
    assert "**Code from answers ran without a sandbox in this training run**" in card


def test_the_embedded_model_is_told(run):
    assert "ships with localrl" in make_card(read_facts(run("notes.txt", "x")), ADDRESS)
    config = RunConfig.create({"model.path": "/home/me/secret"}).to_toml()
    card = make_card(read_facts(run("config.toml", config)), ADDRESS)
    assert "ships with localrl" not in card
    assert "secret" not in card


def test_a_card_says_at_which_temperature_was_evaluated(run):
    def card(*temperature):
        sides = {"base": {"n": 4}, "adapter": {"n": 4, **dict(temperature)}}
        return make_card(read_facts(run("eval.json", sides)), ADDRESS)

    assert "one completion each, temperature 1. pass@1" in card()  # an older run
    assert "one completion each, temperature 0.7. pass@1" in card(("temperature", 0.7))
    assert "one completion each, greedy. pass@1" in card(("temperature", 0))


def test_a_run_without_evaluation_says_so(run):
    folder = run("eval.json", {})
    for name in ("metrics.jsonl", "plan.json"):
        (folder / name).unlink()
    facts = read_facts(folder)
    card = make_card(facts, ADDRESS)
    assert (facts.base, facts.curve, facts.peak_bytes) == (None, (), None)
    assert "This run was not evaluated." in card
    assert "model-index" not in card
    assert "## Training" not in card
    assert "held by MLX: unknown" in card


def test_numbers_that_are_none_are_not_made_up(run):
    facts = read_facts(run("eval.json", {"base": {"n": "many", "ci95": None}, "adapter": {}}))
    assert facts.base == facts.adapter == HeldOutResult(None, None, None, None, 1.0)
    assert "| base | unknown | unknown | unknown to unknown | unknown |" in make_card(
        facts, ADDRESS
    )


def test_without_the_peft_half_the_card_says_why(run):
    card = make_card(read_facts(run("a", "")), Address("me/tiny", "acme/base", "it is too new"))
    assert "There are no weights in PEFT format: it is too new." in card
    assert "from_pretrained" not in card


def test_a_curve_by_hand():
    assert plot([0.0, 8.0, 4.0]).splitlines() == [
        "   8.000 | #",
        "         | #",
        "         | #",
        "         | #",
        "         | ##",
        "         | ##",
        "         | ##",
        "         | ##",
        "   0.000 |###",
    ]
    assert plot([1.0, 3.0, 5.0, 7.0, 9.0], each=2).splitlines()[0] == "   9.000 |  #"
    assert plot([0.5, 0.5]).splitlines()[-1] == "   0.500 |##"


def test_a_long_run_fits_into_the_width(run):
    rows = "".join(json.dumps({"step": i, "reward": i % 7}) + "\n" for i in range(1, 1001))
    card = make_card(read_facts(run("metrics.jsonl", rows)), ADDRESS)
    assert "Mean reward of 1000 steps; each column is the mean of 17 steps." in card
    chart = card.partition("```text\n")[2].partition("```")[0]
    assert max(map(len, chart.splitlines())) <= 70


def test_nothing_in_a_sample_ends_its_fence(run):
    text = "a\n```\n# Heading\n---\n````"
    assert fence(text) == f"`````text\n{text}\n`````"
    assert fence("x" * 3000).count("x") == 2000 + 1  # one in "text"
    sample = Sample("p", text, None)
    card = make_card(read_facts(run("a", "")), ADDRESS, [sample])
    assert "Reward none:" in card
    assert ModelCard(card).data.to_dict()["library_name"] == "peft"


def test_a_folder_that_cannot_be_read_is_refused(run):
    folder = run("eval.json", "{")
    with pytest.raises(DataError, match=r"eval\.json cannot be read"):
        read_facts(folder)
    run("eval.json", "{}")
    run("config.toml", "=")
    with pytest.raises(DataError, match=r"config\.toml cannot be read"):
        read_facts(folder)
    (folder / "run.json").unlink()
    with pytest.raises(ConfigError, match="is not a localrl run"):
        read_facts(folder)
