"""Rewards for form, with the numbers that TRL gives."""

from typing import Any

import pytest

from localrl.rewards.shaping import (
    get_cosine_scaled_reward,
    get_length_reward,
    get_regex_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)


def ids(*lengths: int) -> list[list[int]]:
    return [[1] * length for length in lengths]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nThis is my reasoning.\n</think>\nThis is my answer.", 1.0),
        ("<think></think>", 1.0),
        ("<think>a</think>b</think>c", 1.0),
        ("<think>\nThis is my reasoning.\nThis is my answer.", 0.0),
        ("a<think>b</think>c", 0.0),
        (" <think>b</think>c", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think><think>", 0.0),
        ("</think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text: str, reward: float) -> None:
    completions = [[{"role": "assistant", "content": text}]]
    assert think_format_reward(completions=completions, answer=["a"]) == [reward]


@pytest.mark.parametrize(
    ("prompt", "text", "reward"),
    [
        ("<|assistant|><think>\n", "I add.</think>7", 1.0),
        ("<|assistant|><think>", "</think>", 1.0),
        ("<|assistant|><think>\n", "<think>I add.</think>7", 0.0),  # a second one
        ("<|assistant|><think>\n", "7", 0.0),
        ("<|assistant|><think>\n", "a</think>b<think>", 0.0),
        ("<|assistant|>", "<think>I add.</think>7", 1.0),
        ("<|assistant|>", "I add.</think>7", 0.0),
        ("<think>\n\n</think>\n", "7", 0.0),
        ("", "<think></think>", 1.0),
    ],
)
def test_a_thought_may_begin_in_the_prompt(prompt: str, text: str, reward: float) -> None:
    assert think_format_reward(completions=[text], rendered_prompts=[prompt]) == [reward]


def test_regular_expressions() -> None:
    texts = ["<a>1\n2</a>\n", "see <a>1</a>", "1"]
    assert get_regex_reward("<a>.*</a>")(texts) == [1.0, 0.0, 0.0]
    assert get_regex_reward("<a>.*</a>", search=True)(texts) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing"):
        get_regex_reward("(")


def test_soft_overlong_punishment() -> None:
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = ids(0, 80, 81, 90, 100, 101, 1000)
    assert punish(completion_ids=lengths, answer=[]) == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
    assert get_soft_overlong_punishment(100, 0)(ids(100, 101)) == [0.0, -1.0]
    assert get_soft_overlong_punishment(100, 100)(ids(0, 50)) == [0.0, -0.5]


def test_repetition_penalty() -> None:
    pairs = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert pairs([[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2], [1], []]) == [
        0.0,
        -0.75,
        pytest.approx(-1 / 3),
        0.0,
        0.0,
    ]
    assert get_repetition_penalty_reward()([[7] * 6, [1, 2, 3]]) == [-0.75, 0.0]
    assert get_repetition_penalty_reward(1, -2.0)([[7] * 4]) == [-1.5]


def test_cosine_scaled_accuracy() -> None:
    reward = get_cosine_scaled_reward(max_len=100)
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"]
    gold = [r"\frac{1}{3}"] * 2
    assert reward(texts, gold, ids(50, 50)) == [pytest.approx(0.75), pytest.approx(-0.75)]
    assert reward(texts, gold, ids(0, 0)) == [1.0, -1.0]
    assert reward(texts, gold, ids(100, 100)) == [0.5, -0.5]
    assert reward(texts, gold, ids(300, 300)) == [0.5, -0.5]
    assert reward(completions=["1"], answer=[None], completion_ids=ids(1)) == [None]
    wide = get_cosine_scaled_reward(10, -2.0, -1.0, 0.0, 4.0)
    assert wide(texts, gold, ids(0, 10)) == [4.0, -1.0]


def test_length() -> None:
    shorter, longer = get_length_reward(best=10, worst=20), get_length_reward(best=20, worst=10)
    assert shorter(ids(0, 10, 15, 20, 99)) == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert longer(ids(0, 10, 15, 20, 99)) == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        (get_soft_overlong_punishment, (10, 11), "soft_punish_cache is 11"),
        (get_soft_overlong_punishment, (10, -1), "soft_punish_cache is -1"),
        (get_repetition_penalty_reward, (0,), "ngram_size is 0"),
        (get_repetition_penalty_reward, (3, 0.5), "max_penalty is 0.5"),
        (get_cosine_scaled_reward, (0,), "max_len is 0"),
        (get_length_reward, (5, 5), "worst is 5"),
        (get_length_reward, (-1, 5), "best is -1"),
    ],
)
def test_settings_out_of_range(factory: Any, settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory(*settings)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (get_soft_overlong_punishment(9, 3), "soft_overlong_punishment_reward"),
        (get_repetition_penalty_reward(), "repetition_penalty_reward"),
        (get_cosine_scaled_reward(9), "cosine_scaled_reward"),
        (get_regex_reward("a"), "regex_reward"),
        (get_length_reward(1, 2), "length_reward"),
    ],
)
def test_functions_bear_their_names(made: Any, name: str) -> None:
    assert made.__name__ == name
