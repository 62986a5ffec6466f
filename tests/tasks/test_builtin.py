"""The built-in tasks: what is held out, what repeats, what scores."""

from itertools import islice

import pytest

from localrl.errors import ConfigError
from localrl.records import Example
from localrl.rewards.answers import final_answer
from localrl.tasks import sorting, sums
from localrl.tasks.builtin import FAMILIES, draw_problem, held_out, list_tasks, load_task


def canonical(example: Example) -> tuple[str, tuple[str, ...]]:
    """What must never be in both streams: the family and the operands in any order."""
    family, _, operands = example.id.split("/")
    return family, tuple(sorted(operands.split("-")))


def score(example: Example, text: str) -> float | None:
    """Reward of one plain-text completion."""
    return final_answer([""], [text], [[]], answer=[example.answer])[0]


@pytest.mark.parametrize("name", list_tasks())
def test_no_evaluation_problem_is_in_training_in_any_order(name):
    task = load_task(name, train_prompts=0)
    evaluation = {canonical(e) for e in task.evaluation(600)}
    trained = {canonical(task.train(i)) for i in range(1500)}
    base = {
        (family.NAME, tuple(sorted(operands)))
        for i in range(1500)
        for family, _, operands in islice(draw_problem(FAMILIES[name], "base", i), 1)
    }
    assert len(evaluation) > 500
    assert not evaluation & (trained | base)


def test_one_problem_in_eight_is_held_out_whatever_the_order():
    task = load_task("steps", train_prompts=0)
    assert all(held_out(*canonical(e)) for e in task.evaluation(100))
    assert held_out("sums", ("10", "20", "30")) == held_out("sums", ("30", "10", "20"))
    share = sum(held_out("sums", (str(a), str(b))) for a in range(100) for b in range(a)) / 4950
    assert 0.11 < share < 0.14


def test_the_same_arguments_give_the_same_examples():
    for train_prompts in (0, 64):
        first, second = (load_task("steps", train_prompts=train_prompts) for _ in range(2))
        assert [first.train(i) for i in range(64)] == [second.train(i) for i in range(64)]
        assert first.evaluation(32) == second.evaluation(64)[:32]


def test_fixed_training_set_has_distinct_balanced_problems():
    task = load_task("steps", train_prompts=256)
    examples = [task.train(i) for i in range(task.train_size)]
    assert len({e.id for e in examples}) == 256
    assert sum(e.columns["family"] == "sums" for e in examples) == 128
    with pytest.raises(IndexError):
        task.train(256)


def test_evaluation_examples_are_distinct():
    assert len({e.id for e in load_task("sorting", train_prompts=0).evaluation(2000)}) == 2000


def test_tracker_counts_by_family_and_difficulty_when_endless():
    assert load_task("sums", train_prompts=0).train(1).tracker_key == "sums/5"
    fixed = load_task("sums", train_prompts=8).train(1)
    assert fixed.tracker_key == fixed.id
    assert fixed.columns == {"family": "sums", "difficulty": 5}


def test_prompts_and_answers():
    assert sums.prompt(("47", "85", "36", "12")) == "sum 47 85 36 12"
    assert sums.answer(("47", "85", "36", "12")) == "180"
    assert sorting.prompt(tuple("kgbpa")) == "sort kgbpa"
    assert sorting.answer(tuple("kgbpa")) == "abgkp"


@pytest.mark.parametrize("name", list_tasks())
def test_only_the_gold_answer_after_the_last_marker_scores(name):
    for example in load_task(name, train_prompts=0).evaluation(20):
        assert score(example, f"steps;#{example.answer}") == 1.0
        assert score(example, f"steps;#9#{example.answer}") == 1.0
        assert score(example, f"steps;#{example.answer}0") == 0.0
        assert score(example, f"steps;#{example.answer}#") == 0.0
        assert score(example, example.answer) == 0.0


def test_reward_reads_chat_messages():
    messages = [{"role": "assistant", "content": "740;#180"}]
    assert final_answer([""], [messages], [[]], answer=["180"], family=["sums"]) == [1.0]


def test_unknown_task_names_the_closest_and_all():
    with pytest.raises(ConfigError, match=r"'sort'.*'sorting'.*steps, sums, sorting"):
        load_task("sort", train_prompts=0)
    with pytest.raises(ConfigError, match="train_prompts is -1"):
        load_task("sums", train_prompts=-1)
