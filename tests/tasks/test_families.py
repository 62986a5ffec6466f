"""The families for instruction-tuned models: gold answers, wrong ones, hold-out, levels."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from random import Random

import pytest

from localrl.errors import ConfigError
from localrl.processes.worker import Worker
from localrl.records import Example
from localrl.tasks.base import RewardSpec
from localrl.tasks.builtin import FAMILIES, held_out, list_tasks, load_task
from localrl.tasks.family import held_out_as

HASHES = {
    "steps": "a66cd70f2c50ca11",
    "sums": "2d9c4289293e2ae7",
    "sorting": "4edc3ac6a87e81cf",
    "arithmetic": "88ffe34d2635296f",
    "countdown": "a16f0113ab9ea667",
    "reversal": "4e8e55a96dce9383",
    "bases": "7b5af5a51981ca99",
    "dates": "5f5e3bfd7e365ee3",
    "units": "604028828e87f55a",
    "extraction": "fcc084c92e9d30d3",
    "choice": "0ea215201ca68adc",
    "functions": "0953f97ce26abd57",
    "guessing": "06dce50b5ec79ef2",
    "calculator": "6f99a363d863dc43",
}
OTHERS = ("steps", "sums", "sorting", "guessing", "calculator")
"""Not worded for a single answer of an instruction-tuned model; they have tests of their own."""
NEW = [name for name in FAMILIES if name not in OTHERS]
JUDGED = [name for name in NEW if name != "functions"]
LEVELS = [(name, level) for name in NEW for level in FAMILIES[name][0].DIFFICULTIES]
JUDGED_LEVELS = [(name, level) for name, level in LEVELS if name != "functions"]


def text(example: Example) -> str:
    return example.messages[0]["content"]


def says(example: Example, answer: str) -> str:
    """A completion in the form that its prompt asks for."""
    if example.columns["family"] == "extraction":
        return f"The text names 1 person.\n```json\n{answer}\n```"
    return f"First 1 + 1 = 2, then 3 * 4 = 12.\nAnswer: {answer}"


def score(spec: RewardSpec, examples: list[Example], completions: list[str]) -> list[float]:
    """Rewards of plain completions, through the function that a run would call."""
    module, _, name = spec.target.partition(":")
    columns = {key: [e.columns[key] for e in examples] for key in examples[0].columns}
    messages = [[{"role": "assistant", "content": completion}] for completion in completions]
    return getattr(import_module(module), name)(
        prompts=[list(e.messages) for e in examples],
        completions=messages,
        completion_ids=[[] for _ in examples],
        answer=[e.answer for e in examples],
        **columns,
    )


def nearly(example: Example) -> str:
    """An answer that is almost right."""
    family, answer = example.columns["family"], example.answer
    if family == "countdown":
        number = example.columns["numbers"][0]
        return f"{answer} + {number} - {number}"
    if family == "extraction":
        fields = json.loads(answer)
        return json.dumps(fields | {"city": fields["city"] + "s"})
    last = answer[-1]
    return answer[:-1] + ("0" if last == "9" else "a" if last == "z" else chr(ord(last) + 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_the_same_on_any_machine(name):
    task = load_task(name, train_prompts=0)
    prompts = "\n".join(text(task.train(i)) for i in range(100))
    assert hashlib.sha256(prompts.encode()).hexdigest()[:16] == HASHES[name]


@pytest.mark.parametrize(("name", "level"), JUDGED_LEVELS)
def test_gold_answers_score_and_others_do_not(name, level):
    task = load_task(f"{name}:{level}", train_prompts=200)
    (spec,) = task.rewards
    examples = [task.train(i) for i in range(200)]
    assert score(spec, examples, [says(e, e.answer) for e in examples]) == [1.0] * 200
    assert score(spec, examples, [says(e, nearly(e)) for e in examples]) == [0.0] * 200
    assert score(spec, examples, ["I do not know."] * 200) == [0.0] * 200
    swapped = [other.answer for other in [*examples[1:], examples[0]]]
    rewards = score(spec, examples, [says(e, o) for e, o in zip(examples, swapped, strict=True)])
    if name == "countdown":  # an expression of other numbers; never right by chance here
        assert sum(rewards) == 0
    else:
        same = [float(e.answer == other) for e, other in zip(examples, swapped, strict=True)]
        assert rewards == same


@pytest.mark.parametrize("name", [n for n in JUDGED if n != "extraction"])
def test_answers_may_be_boxed_or_emphasised(name):
    task = load_task(name, train_prompts=0)
    (spec,) = task.rewards
    examples = [task.train(i) for i in range(20)]
    forms = ["So it is $\\boxed{%s}$.", "**Answer:** %s", "**Answer: %s**", "final ANSWER:  %s ."]
    for form in forms:
        assert score(spec, examples, [form % e.answer for e in examples]) == [1.0] * 20, form


@pytest.mark.parametrize(("name", "level"), [pair for pair in LEVELS if pair[0] == "functions"])
def test_gold_functions_pass_their_tests_and_others_do_not(name, level):
    task = load_task(f"{name}:{level}", train_prompts=200)
    examples = [task.train(i) for i in range(200)]
    assert all(passes(e.answer, e.columns["tests"]) for e in examples)
    swapped = [*examples[1:], examples[0]]
    assert not any(
        passes(o.answer, e.columns["tests"]) for e, o in zip(examples, swapped, strict=True)
    )
    assert not any(passes("def solve(x): return 0", e.columns["tests"]) for e in examples)


def passes(code: str, tests: list[str]) -> bool:
    """Whether our own code passes; a run judges a model's code in a sandbox."""
    names: dict[str, object] = {}
    exec(code, names)
    try:
        for test in tests:
            exec(test, names)
    except (AssertionError, TypeError):
        return False
    return True


def test_only_functions_need_a_sandbox():
    needy = [name for name in FAMILIES if load_task(name, train_prompts=0).needs_sandbox]
    assert needy == ["functions"]


def test_rewards_load_and_judge_in_a_child():
    with Worker(time_limit_s=30, memory_limit_bytes=None) as worker:
        for name in JUDGED:
            task = load_task(name, train_prompts=0)
            example = task.train(0)
            known = {"prompts", "completions", "completion_ids", "answer", *example.columns}
            reply = worker.resolve(task.rewards[0].target)
            assert reply.ok, reply.message
            assert set(reply.value) <= known


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_finite_sets_and_evaluation_never_share_a_prompt(name, level):
    task = load_task(f"{name}:{level}", train_prompts=200)
    examples = [task.train(i) for i in range(200)] + task.evaluation(128)
    assert len({text(e) for e in examples}) == len({e.id for e in examples}) == 328
    assert {e.columns["difficulty"] for e in examples} == {level}
    assert all(e.tracker_key == e.id for e in examples)
    endless = load_task(name, train_prompts=0)
    assert not {text(e) for e in endless.evaluation(300)} & {text(e) for e in examples[:200]}
    assert endless.train(level - 1).tracker_key == f"{name}/{level}"


@pytest.mark.parametrize("name", NEW)
def test_the_hold_out_rule_looks_at_the_substance(name):
    (family,) = FAMILIES[name]
    rng = Random(0)
    for _ in range(200):
        operands = family.draw(rng, family.DIFFICULTIES[0])
        assert all(operand and not set(operand) & set("-,/") for operand in operands)
    if name == "arithmetic":
        sums = ("1", "2", "plus")
        assert held_out_as(family, ("words", *sums)) == held_out_as(family, ("symbols", *sums))
    if name == "choice":
        source = FAMILIES[operands[0]][0]
        assert held_out(*held_out_as(family, operands)) == held_out(
            *held_out_as(source, operands[3:])
        )
        assert family.answer(operands) in "ABC"


def test_a_level_that_runs_out_says_so():
    with pytest.raises(
        ConfigError, match=r"'bases:1' does not have \d+ different training problems"
    ):
        load_task("bases:1", train_prompts=3000).train(0)
    with pytest.raises(
        ConfigError, match=r"'dates:1' does not have \d+ different held-out problems"
    ):
        load_task("dates:1", train_prompts=0).evaluation(1000)


def test_levels_in_the_name():
    some = load_task("countdown:2-3", train_prompts=0)
    assert [some.train(i).columns["difficulty"] for i in range(4)] == [2, 3, 2, 3]
    assert some.name == "countdown:2-3"
    assert some.description.endswith("only levels 2 to 3")
    assert load_task("steps:5", train_prompts=0).train(3).id.startswith("sorting/5/")
    for wrong in ("countdown:5", "countdown:0", "countdown:3-2", "countdown:", "countdown:a"):
        with pytest.raises(ConfigError, match="countdown has levels 1 to 4"):
            load_task(wrong, train_prompts=0)
    with pytest.raises(ConfigError, match="did you mean 'countdown'"):
        load_task("countdwn:2", train_prompts=0)


def test_the_list_names_the_levels():
    assert list(list_tasks()) == list(FAMILIES)
    assert list_tasks()["dates"].endswith("(levels 1 to 5)")
