"""The verifiers of countdown and of numbers in a base: exact, and not to be upset by anything."""

from __future__ import annotations

import time

import pytest

from localrl.errors import ConfigError
from localrl.rewards.bases import base_reward, conclusion
from localrl.rewards.code import code_reward
from localrl.rewards.countdown import countdown_reward, value_of
from localrl.tasks.builtin import load_task

GARBAGE = [
    "(" * 10_000,
    "Answer: " + "(" * 190,
    "Answer: " + "1+" * 99 + "1",
    "Answer: 9**9**9**9**9",
    "Answer: " + "9" * 10_000,
    "Answer: " * 1250,
    "answer" + " " * 10_000,
    "\\boxed{" * 1400,
    "\\boxed{" + "}" * 9_000,
    "**Answer:** __import__('os').getcwd()",
    "Answer: 3 / (8 - 8)",
    "Answer: \x00\ud800\u0663",
    "Answer: 0x3 + 8_0",
    "Answer: 3 8",
    "Answer: 3(8)",
    "Answer: ~3",
    "Answer: =",
    "{" * 10_000,
    "",
]


def reward(text: str, target: int = 24, numbers: tuple[int, ...] = (3, 8, 8)) -> float:
    return countdown_reward(completions=[text], target=[target], numbers=[numbers])[0]


@pytest.mark.parametrize(
    "answer",
    ["3 * 8", "8 * 3 = 24", "8*3", "(8 * 3)", "3 \u00d7 8", "$3 \\times 8$", "\\boxed{3 \\cdot 8}"],
)
def test_right_expressions(answer):
    assert reward(f"Hm, 3 + 8 = 11.\nAnswer: {answer}") == 1.0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("8 + 8 + 8", "8 is there twice only"),
        ("24", "the target is not a given number"),
        ("3 * 8 = 25", "a wrong claim"),
        ("3 * 8 + 0", "0 is not given"),
        ("-(-3) * 8", "no signs"),
        ("27 // 3", "no other operators"),
        ("3 + 8", "another value"),
        ("3.0 * 8", "whole numbers only"),
        ("8 * 3 # 24", "nothing else"),
    ],
)
def test_wrong_expressions(answer, why):
    assert reward(f"Answer: {answer}") == 0.0, why


def test_values_are_exact():
    assert reward("Answer: 8 / (3 - 8 / 3)", 24, (8, 3, 8, 3)) == 1.0
    assert value_of("1 / 3 * 3", (1, 3, 3)) == 1
    assert reward("Answer: 49 / 10", 5, (49, 10)) == 0.0


def test_garbage_is_worth_nothing_and_takes_no_time():
    started = time.process_time()
    for text in GARBAGE:
        assert reward(text) == 0.0
        assert base_reward(completions=[text], answer=["ff"], base=[16]) == [0.0]
    assert time.process_time() - started < 0.01 * len(GARBAGE)


def test_the_conclusion():
    assert conclusion("Answer: 3\nAnswer: **4**.") == "4"
    assert conclusion("so \\boxed{\\frac{1}{2}} it is") == "\\frac{1}{2}"
    assert conclusion("<think>Answer: 3</think> no") == ""
    assert conclusion("") == conclusion("Answer:") == ""


@pytest.mark.parametrize(
    ("said", "right"),
    [("ff", 1), ("FF", 1), ("0xff", 1), ("00ff", 1), ("f f", 1), ("255", 0), ("fe", 0), ("f.f", 0)],
)
def test_numbers_in_a_base(said, right):
    assert base_reward(completions=[f"Answer: {said}"], answer=["ff"], base=[16]) == [right]


def test_gold_functions_score_in_the_sandbox():
    task = load_task("functions", train_prompts=4)
    examples = [task.train(i) for i in range(4)]
    tests = [e.columns["tests"] for e in examples]
    answers = [f"Here it is:\n```python\n{e.answer}\n```" for e in examples]
    try:
        assert code_reward(completions=answers, tests=tests) == [1.0] * 4
    except ConfigError as error:
        pytest.skip(str(error))
    assert max(code_reward(completions=[*answers[1:], answers[0]], tests=tests)) < 1.0
