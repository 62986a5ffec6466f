"""Gold answers as completions: the one that the reward compares with."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.records import RewardSpec
from localrl.rewards.accuracy import accuracy_reward, choice_reward
from localrl.tasks.gold import gold_completion
from localrl.tasks.rows import to_example

LONG = "x" * 2500


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny.make_folder(tmp_path_factory.mktemp("models") / "model"))


@pytest.mark.parametrize(
    ("columns", "reward", "right"),
    [
        ({"answer": "   ", "solution": "7"}, accuracy_reward, "7"),
        ({"answer": [""], "solution": "7"}, accuracy_reward, "7"),
        ({"answer": [None, " "], "ground_truth": "7"}, accuracy_reward, "7"),
        ({"answer": LONG, "solution": "7"}, accuracy_reward, "7"),
        ({"answer": [LONG, None, "8"], "solution": "7"}, accuracy_reward, "8"),
        ({"answer": "***", "solution": ["", "7"]}, accuracy_reward, "7"),
        ({"answer": "words", "solution": "(B)"}, choice_reward, "B"),
        ({"solution": "So the total is 7."}, accuracy_reward, "7"),
        ({"answer": "We add 3 and 4. Thus she has 7 apples left."}, accuracy_reward, "7"),
        ({"answer": "Therefore, x = 7."}, accuracy_reward, "7"),
        ({"answer": "The answer is 7"}, accuracy_reward, "7"),
        ({"answer": "3 and 4, so <answer>7</answer>"}, accuracy_reward, "7"),
        ({"answer": "The answer is B"}, choice_reward, "B"),
    ],
)
def test_the_gold_answer_is_the_one_that_the_reward_reads(
    tokenizer: Tokenizer, columns: dict[str, Any], reward: Any, right: str
) -> None:
    example = to_example("row 1", {"prompt": "?", **columns}, None)
    spec = RewardSpec("r", f"{reward.__module__}:{reward.__name__}")
    text = gold_completion(example, tokenizer, [spec]).leaves[0].text
    asked = {"answer": [example.answer], "solution": [columns.get("solution")]}
    assert (reward([text], **asked), reward([right], **asked)) == ([1.0], [1.0])
    assert reward(["6"], **asked) == [0.0]


@pytest.mark.parametrize("words", ["Paris is big", "x = 5 or x = 6", "It is not 7", "New York 7"])
def test_golds_that_give_no_number_stay_words(words: str) -> None:
    assert accuracy_reward(["7", words], answer=[words] * 2) == [0.0, 1.0]
