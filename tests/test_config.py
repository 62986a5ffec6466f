from __future__ import annotations

import json
import tomllib
from functools import partial

import pytest

from localrl.config import ALIASES, OLDER_RUNS, REMOVED, RunConfig, keys, parse_setting
from localrl.errors import ConfigError


def test_settings_over_file_over_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "m"\n[rollout]\ngroup_size = 4\ntemperature = 1\n')
    config = RunConfig.create({"rollout.group_size": 6}, file=file)
    assert config.rollout.group_size == 6
    assert config.rollout.temperature == 1.0
    assert config.learning.lr == 5e-5


def test_the_demonstration_applies_only_without_a_model():
    assert RunConfig.create({"model.path": "m"}) == RunConfig().replace("model.path", "m")
    demonstration = RunConfig.create()
    assert demonstration.task.train_prompts == 256
    assert demonstration != RunConfig()
    assert RunConfig.create({"task.train_prompts": 12}).task.train_prompts == 12


def test_the_printed_configuration_reads_back(tmp_path):
    config = RunConfig.create({"model.path": 'a "b" \\ c', "run.minutes": 2, "run.seed": 7})
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())
    assert RunConfig.create(file=file) == config
    assert set(tomllib.loads(config.to_toml())) == {key.split(".")[0] for key in keys()}


def test_what_is_unset_stays_unset_and_what_is_set_reads_back(tmp_path):
    settings = {
        "model.path": "m",
        "rollout.strategy": "adaptive",
        "rollout.stop_text": ['"é\\\n\x7f</answer>\t', "\n\n"],
        "rollout.stop_loops": True,
        "rollout.reuse": 1,
        "task.cut_reward": -1,
        "learning.kappa": 0,
    }
    config = RunConfig.create(settings)
    assert (config.task.cut_reward, config.learning.kappa, config.rollout.reuse) == (-1.0, 0, 1.0)
    plain = RunConfig()
    assert (plain.task.cut_reward, plain.learning.kappa, plain.rollout.stop_text) == (
        None,
        None,
        (),
    )
    for each in (config, plain):
        file = tmp_path / "run.toml"
        file.write_text(each.to_toml())
        assert RunConfig.create({"model.path": "m"}, file=file) == each.replace("model.path", "m")


def test_trl_spellings_are_aliases():
    config = RunConfig.create({"num_generations": 4, "max_completion_length": 9, "model.path": "m"})
    assert (config.rollout.group_size, config.rollout.max_completion_tokens) == (4, 9)
    assert set(ALIASES.values()) <= set(keys())
    learning = RunConfig.create({"loss_type": "dapo", "beta": 0.04, "model.path": "m"}).learning
    assert (learning.objective, learning.kl_coef) == ("dapo", 0.04)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout.groupsize": 4}, "Did you mean 'rollout.group_size'"),
        ({"group_size": 4}, "Did you mean 'rollout.group_size'"),
        ({"nonsense": 4}, "Unknown setting 'nonsense'"),
        ({"rollout": 4}, "Unknown setting 'rollout'"),
        ({"rollout.group_size": -1}, "rollout.group_size is -1; it must be at least 0"),
        ({"rollout.group_size": "8"}, "'8'; it must be of type int"),
        ({"rollout.group_size": True}, "True; it must be of type int"),
        ({"rollout.group_size": None}, "None; it must be of type int"),
        ({"learning.clip_low": 1.5}, "between 0.0 and 1.0"),
        ({"learning.lr": float("nan")}, "nan; it must be at least 0.0"),
        ({"memory.dequantise": "maybe"}, "must be auto, on or off"),
        ({"memory.limit": "6"}, "memory.limit is '6'; its form is wrong"),
        ({"memory.limit": "six GB"}, "6GB, or 70% of the machine's"),
        ({"memory.limit": 6}, "6; it must be of type str"),
        ({"learning.objective": "ppo"}, "must be clipped, grpo, dr_grpo"),
        ({"learning.prompt_weight": "var"}, "must be none, mean, std or maxrl"),
        ({"learning.kl_estimator": "k4"}, "must be k1, k2 or k3"),
        ({"learning.kl_coef": -0.1}, "must be at least 0.0"),
        ({"rollout.strategy": "rounds"}, "must be flat, tree or adaptive"),
        ({"rollout.stop_loops": 1}, "1; it must be of type bool"),
        ({"rollout.stop_text": 3}, "has 3; each must be of type str"),
        ({"rollout.reuse": 1.5}, "between 0.0 and 1.0"),
        ({"learning.min_advantage": -0.1}, "must be at least 0.0"),
        ({"learning.kappa": -1}, "must be at least 0.0"),
        ({"task.cut_reward": "none"}, "'none'; it must be of type float"),
        ({"num_generations": 4, "rollout.group_size": 4}, "set twice"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.create({"model.path": "m", **settings})
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a.b = 1e-5", ("a.b", 1e-5)),
        ("a.b=true", ("a.b", True)),
        ("a.b=plain text", ("a.b", "plain text")),
        ('a.b="x=y"', ("a.b", "x=y")),
    ],
)
def test_parse_setting(text, pair):
    assert parse_setting(text) == pair


@pytest.mark.parametrize("content", [b"[rollout\n", b"\xff\xfe"])
def test_a_broken_file_is_named(tmp_path, content):
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
        RunConfig.create(file=file)
    with pytest.raises(ConfigError, match="Cannot read"):
        RunConfig.create(file=tmp_path / "none.toml")


def test_evaluations_are_at_the_temperature_of_training_unless_it_is_said():
    warm = RunConfig.create({"rollout.temperature": 0.7})
    assert warm.eval_temperature == 0.7
    assert warm.replace("task.eval_temperature", 0).eval_temperature == 0
    with pytest.raises(ConfigError, match=r"must be 0, or between 0\.01 and 100"):
        warm.replace("task.eval_temperature", 0.001)


def test_a_run_older_than_a_setting_keeps_what_it_did(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("[rollout]\ntemperature = 0.7\n")
    assert RunConfig.of_run(file).eval_temperature == 1.0
    assert RunConfig.of_run(file, {"task.eval_temperature": 0.5}).eval_temperature == 0.5
    assert RunConfig.create(file=file).eval_temperature == 0.7


def test_a_run_of_a_removed_strategy_can_be_looked_at(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('[rollout]\nstrategy = "adaptive-tree"\n')
    assert RunConfig.of_run(file).rollout.strategy == "tree"
    with pytest.raises(ConfigError, match="must be flat, tree or adaptive"):
        RunConfig.of_run(file, to_train=True)


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_setting_may_have_no_effect(tmp_path, key):
    """Older runs have all of them in their config.toml."""
    section, name = key.split(".")
    file = tmp_path / "config.toml"
    file.write_text(f"[{section}]\n{name} = {json.dumps(REMOVED[key])}\n")
    assert RunConfig.create({key: REMOVED[key]}, file=file) == RunConfig.create()
    file.write_text(f"[{section}]\n{name} = 3\n")
    assert RunConfig.of_run(file) == RunConfig.create(OLDER_RUNS)  # to look at it, or to export it
    again = partial(RunConfig.of_run, file, to_train=True)
    for read in (again, lambda: RunConfig.create({key: 3})):
        with pytest.raises(ConfigError, match=f"^{key} is 3, but this setting was removed"):
            read()
