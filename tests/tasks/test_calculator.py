"""Calculator: the problems, the tool alone, and whose last word counts."""

from __future__ import annotations

import time

import pytest

from localrl.rewards.accuracy import accuracy_reward
from localrl.tasks.builtin import load_task
from localrl.tasks.calculator import answer, prompt
from localrl.tasks.calculator_tool import Calculator

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "calculate", "arguments": {"expression": "47*85"}},
        }
    ],
}
RESULT = {"role": "tool", "name": "calculate", "content": "3995"}


def calculate(expression: str) -> str:
    tool = Calculator()
    tool.reset(answer="1", family="calculator", prompt=[])
    return tool.calculate(expression)


def test_prompt_and_answer():
    assert prompt(("47", "85")) == "What is 47 times 85?"
    assert answer(("47", "85")) == "3995"
    task = load_task("calculator", train_prompts=0)
    assert task.environment == "localrl.tasks.calculator_tool:Calculator"
    assert [spec.name for spec in task.rewards] == ["accuracy"]


@pytest.mark.parametrize(("level", "digits"), [(1, {(2, 2)}), (2, {(2, 3), (3, 2)}), (3, {(3, 3)})])
def test_levels_are_digits(level, digits):
    task = load_task(f"calculator:{level}", train_prompts=300)
    examples = [task.train(i) for i in range(300)] + task.evaluation(100)
    factors = [e.id.split("/")[2].split("-") for e in examples]
    assert {(len(a), len(b)) for a, b in factors} == digits
    assert all(
        int(e.answer) == int(a) * int(b) for e, (a, b) in zip(examples, factors, strict=True)
    )
    again = load_task(f"calculator:{level}", train_prompts=300)
    assert [again.train(i) for i in range(300)] + again.evaluation(100) == examples
    pairs = [tuple(sorted(pair)) for pair in factors]
    assert not set(pairs[:300]) & set(pairs[300:])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("47*85", "3995"),
        (" (3 + 4) * -5 ", "-35"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3 * 3", "1"),
        ("1/8", "0.125"),
        ("2 - +2", "0"),
        ("999 * 999", "998001"),
        ("1e3 * 2", "2000"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("2 ** 9", "only numbers"),
        ("9 // 2", "only numbers"),
        ("9 % 2", "only numbers"),
        ("~1", "only numbers"),
        ("True + 1", "only numbers"),
        ("1j * 1j", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("__import__('os').getcwd()", "only numbers"),
        ("[1][0]", "only numbers"),
        ("x", "only numbers"),
        ("", "not an expression"),
        ("47 85", "not an expression"),
        ("47 \u00d7 85", "not an expression"),
        ("1\x00", "not an expression"),
        ("(" * 150 + "1", "not an expression"),
        ("1 / (3 - 3)", "division by zero"),
        ("1e999", "too large"),
        ("1e-999 + 1e-60", "too large"),
        ("*".join(["9999999999"] * 18), "too large"),
        ("1" * 201, "at most 200 characters"),
    ],
)
def test_all_else_is_a_tool_error(expression, reason):
    with pytest.raises(ValueError, match=reason):
        calculate(expression)


def test_nothing_takes_long():
    started = time.process_time()
    for text in ("(" * 99 + "1" + ")" * 99, "-" * 199 + "1", "1+" * 99 + "1", "9" * 200):
        try:
            calculate(text)
        except ValueError:
            continue
    assert time.process_time() - started < 1.0


def test_the_models_own_last_message_counts():
    said = {"role": "assistant", "content": "It is 3,995."}
    assert accuracy_reward([[CALL, RESULT, said]], answer=["3995"]) == [1.0]
    assert accuracy_reward([[{"role": "assistant", "content": "3995"}]], answer=["3995"]) == [1.0]
    wrong = {"role": "assistant", "content": "It is 3996."}
    assert accuracy_reward([[CALL, RESULT, wrong]], answer=["3995"]) == [0.0]
    assert accuracy_reward([[CALL, RESULT]], answer=["3995"]) == [0.0]
    assert accuracy_reward([[CALL]], answer=["3995"]) == [0.0]
    without = {key: value for key, value in CALL.items() if key != "content"}
    assert accuracy_reward([[without]], answer=["3995"]) == [0.0]
