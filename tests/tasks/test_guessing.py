"""Guessing: the environment alone, gold play, wrong play, and what is held out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from localrl.errors import ConfigError
from localrl.records import Example
from localrl.tasks.builtin import load_task
from localrl.tasks.guessing import Guess, stated_guess

LEVELS = (1, 2, 3)
TURNS = {1: 4, 2: 4, 3: 4}
"""Guesses by halves that find any number: a range of n numbers takes log2(n + 1), rounded up."""


def begin(example: Example) -> Guess:
    game = Guess()
    assert (
        game.reset(prompt=list(example.messages), answer=example.answer, **example.columns) is None
    )
    return game


def halve(example: Example, turns: int) -> tuple[float, int]:
    """The reward of always taking the middle, and the guesses made."""
    game = begin(example)
    low, high = example.columns["low"], example.columns["high"]
    for turn in range(1, turns + 1):
        middle = (low + high) // 2
        said = game.step(str(middle))
        if said is None:
            return game.get_reward(), turn
        low, high = (middle + 1, high) if said == "higher" else (low, middle - 1)
    return game.get_reward(), turns


def test_prompt_answer_and_columns():
    task = load_task("guessing", train_prompts=0)
    example = task.train(0)
    low, high, number = example.id.split("/")[2].split("-")
    assert example.messages[0]["content"] == (
        f"I am thinking of a whole number from {low} to {high}. Guess it: write one number, and I "
        "will say whether mine is higher or lower. Use as few guesses as you can."
    )
    assert example.answer == number
    assert example.columns == {
        "family": "guessing",
        "difficulty": 1,
        "low": int(low),
        "high": int(high),
    }
    assert task.environment == "localrl.tasks.guessing:Guess"
    assert task.rewards == ()


def test_the_same_seed_gives_the_same_problems():
    first, second = (load_task("guessing", train_prompts=0) for _ in range(2))
    assert [first.train(i) for i in range(50)] == [second.train(i) for i in range(50)]


@pytest.mark.parametrize("level", LEVELS)
def test_sizes_of_the_range(level):
    task = load_task(f"guessing:{level}", train_prompts=0)
    columns = [task.train(i).columns for i in range(300)]
    sizes = {c["high"] - c["low"] + 1 for c in columns}
    assert sizes == {1: {6, 7, 8, 9}, 2: {10, 11, 12}, 3: {13, 14, 15}}[level]
    assert all(c["low"] >= 1 and c["high"] <= 99 for c in columns)
    assert all(
        int(e.answer) in range(e.columns["low"], e.columns["high"] + 1)
        for e in map(task.train, range(300))
    )


@pytest.mark.parametrize("level", LEVELS)
def test_halving_finds_every_number(level):
    """The gold play scores 1.0 in four guesses at every level, and not always in three."""
    task = load_task(f"guessing:{level}", train_prompts=0)
    played = [halve(task.train(i), 4) for i in range(300)]
    assert all(reward == 1.0 for reward, _ in played)
    assert {guesses for _, guesses in played} == {1, 2, 3, 4}
    assert min(halve(task.train(i), 3)[0] for i in range(300)) == 0.0


def test_a_game():
    game = Guess()
    assert game.reset(answer="42", low=37, high=51, family="guessing") is None
    assert game.step("44") == "lower"
    assert game.step("<think>42 or 40?</think>I say 40.") == "higher"
    assert game.step("no idea") == "Write one number from 37 to 51."
    assert game.step("100") == "lower"
    assert game.get_reward() == 0.0
    assert game.step("Is it 42?") is None
    assert game.get_reward() == 1.0
    assert game.step("44") is None
    assert game.get_reward() == 1.0
    game.reset(answer="7", low=1, high=9)
    assert game.get_reward() == 0.0


def test_wrong_plays_are_worth_nothing():
    for example in map(load_task("guessing", train_prompts=0).train, range(60)):
        low, number = example.columns["low"], int(example.answer)
        game = begin(example)
        for _ in range(4):
            assert game.step(str(low if low != number else low + 1)) in ("higher", "lower")
        assert game.get_reward() == 0.0
        game = begin(example)
        listed = " ".join(map(str, range(low, example.columns["high"] + 1))) + " 0"
        assert game.step(listed) == "higher"
        assert game.step("9" * 5000) == f"Write one number from {low} to {example.columns['high']}."
        assert game.get_reward() == 0.0


def test_what_counts_as_a_guess():
    assert stated_guess("44") == stated_guess("not 43, but 44.") == 44
    assert stated_guess("<think>50</think>") is None
    assert stated_guess("") is None
    assert stated_guess("\u0664\u0664") is None


def test_a_range_is_held_out_with_all_its_numbers():
    for level in LEVELS:
        task = load_task(f"guessing:{level}", train_prompts=500)
        held_out = task.evaluation(256)
        trained = [task.train(i) for i in range(500)]
        assert len({e.id for e in [*held_out, *trained]}) == 756
        ranges = {(e.columns["low"], e.columns["high"]) for e in held_out}
        assert not ranges & {(e.columns["low"], e.columns["high"]) for e in trained}
        assert len(ranges) < 100, "a range comes with several of its numbers"


def test_a_level_that_runs_out_says_so():
    with pytest.raises(
        ConfigError, match=r"'guessing:1' does not have \d+ different held-out problems"
    ):
        load_task("guessing:1", train_prompts=0).evaluation(1000)


def test_the_environments_are_plain_python():
    code = (
        "import sys, localrl.tasks.guessing, localrl.tasks.calculator_tool\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"numpy", "mlx", "mlx_lm", "transformers"} & set(loaded.stdout.split())
