"""What a person writes for a reward, and what it becomes."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import DEADLINE_S

from localrl.errors import ConfigError
from localrl.processes.worker import Worker
from localrl.records import RewardSpec
from localrl.rewards.catalog import BUILTINS, parse_rewards
from localrl.rewards.scoring import Scorer

SETTINGS = {
    "pattern": "'a'",
    "schema": "{'type': 'object'}",
    "max_completion_len": 100,
    "soft_punish_cache": 20,
    "max_len": 100,
    "best": 10,
    "worst": 20,
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit_s=20.0, memory_limit_bytes=None) as worker:
        yield worker


def one(text: str) -> tuple[str, str]:
    [reward] = parse_rewards([text])
    return reward.name, reward.target


@pytest.mark.parametrize(
    ("text", "name", "target"),
    [
        ("accuracy", "accuracy_reward", "localrl.rewards.accuracy:accuracy_reward"),
        ("accuracy_reward", "accuracy_reward", "localrl.rewards.accuracy:accuracy_reward"),
        (
            "get_soft_overlong_punishment",
            "soft_overlong_punishment_reward",
            "localrl.rewards.shaping:get_soft_overlong_punishment"
            "(max_completion_len=1280, soft_punish_cache=256)",
        ),
        (
            "soft_overlong(max_completion_len=256, soft_punish_cache=64)",
            "soft_overlong_punishment_reward",
            "localrl.rewards.shaping:get_soft_overlong_punishment"
            "(max_completion_len=256, soft_punish_cache=64)",
        ),
        (
            "repetition",
            "repetition_penalty_reward",
            "localrl.rewards.shaping:get_repetition_penalty_reward()",
        ),
        ("regex(pattern='(a:b)')", "regex_reward", "*:get_regex_reward(pattern='(a:b)')"),
        ("json", "json_reward", "localrl.rewards.json_answers:json_reward"),
        ("my/rewards.py:good", "good", "my/rewards.py:good"),
        ("rewards.py:Judge.score", "score", "rewards.py:Judge.score"),
        ("package.module:good", "good", "package.module:good"),
        ("package.module.good", "good", "package.module:good"),
        ("package.module.make(a='b.c')", "make", "package.module:make(a='b.c')"),
        ("r.py:make(a=[1, 'x:y(z)'])", "make", "r.py:make(a=[1, 'x:y(z)'])"),
        ("/a (1)/r.py:make(a=1)", "make", "/a (1)/r.py:make(a=1)"),
    ],
)
def test_what_texts_name(text: str, name: str, target: str) -> None:
    assert one(text) == (name, target.replace("*", "localrl.rewards.shaping"))


def test_weights_go_with_their_functions() -> None:
    assert parse_rewards(["accuracy", "a.py:f"], [1, -0.5]) == (
        RewardSpec("accuracy_reward", "localrl.rewards.accuracy:accuracy_reward", 1.0),
        RewardSpec("f", "a.py:f", -0.5),
    )
    assert [r.weight for r in parse_rewards(["accuracy", "a.py:f"])] == [1.0, 1.0]
    assert parse_rewards([]) == ()


def test_names_are_made_different() -> None:
    texts = ["a.py:f", "b.py:f_2", "b.py:f", "c.f", "regex(pattern='a')", "regex(pattern='b')"]
    names = [reward.name for reward in parse_rewards(texts)]
    assert names == ["f", "f_2", "f_3", "f_4", "regex_reward", "regex_reward_2"]


@pytest.mark.parametrize(
    ("texts", "weights", "message"),
    [
        (["acuracy"], None, "Unknown reward 'acuracy'; did you mean 'accuracy'"),
        (["rewards.py"], None, "Unknown reward 'rewards.py'"),
        (["dir/rewards.py"], None, "path/to/file.py:function"),
        (["rewards.py:"], None, "Unknown reward"),
        ([""], None, "Unknown reward ''"),
        (["accuracy(a=1)"], None, "'accuracy(a=1)' takes no settings"),
        (["regex"], None, "'regex' needs pattern; write regex(pattern=...)"),
        (["soft_overlong(max_completion_len=9)"], None, "needs soft_punish_cache"),
        (["regex(pattern=x)"], None, "the value of 'pattern' is not a literal"),
        (["a.py:make(1)"], None, "not of the form (key=value"),
        (["accuracy", "accuracy_reward"], None, "given twice"),
        (["accuracy"], [1.0, 2.0], "1 reward functions have 2 weights"),
        (["accuracy"], [], "1 reward functions have 0 weights"),
        (["accuracy"], [float("inf")], "'accuracy' has weight inf"),
    ],
)
def test_mistakes_are_told(texts: list[str], weights: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_rewards(texts, weights)
    assert message in str(error.value)


@pytest.mark.parametrize("short", BUILTINS)
def test_every_builtin_loads_in_the_child(worker: Worker, short: str) -> None:
    settings = ", ".join(f"{name}={SETTINGS[name]}" for name in BUILTINS[short].needs)
    texts = [f"{short}({settings})"] if BUILTINS[short].factory else []
    texts += [short] if BUILTINS[short].function else []
    for text in texts:
        Scorer(parse_rewards([text]), worker).check(["family"])


def test_builtins_load_the_standard_library_only() -> None:
    modules = "localrl.rewards.shaping", "localrl.rewards.json_answers"
    code = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    ours = [name for name in result.stdout.split() if name.split(".")[0] == "localrl"]
    heavy = {"numpy", "mlx", "asyncio", "sympy"} & set(result.stdout.split())
    assert not heavy
    assert all(name == "localrl" or name.startswith("localrl.rewards") for name in ours)


def test_settings_out_of_range_are_told_before_the_run(worker: Worker) -> None:
    for text in ("regex(pattern='(')", "repetition(ngram_size=0)", "repetition(size=0)"):
        with pytest.raises(ConfigError, match=r"cannot be loaded: .*(rejected|cannot be called)"):
            Scorer(parse_rewards([text]), worker).check()
