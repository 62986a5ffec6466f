"""The table of answers beside math-verify: what differs is told there."""

from __future__ import annotations

from answer_table import read_table

from localrl.rewards.latex import math_verify_reward


def test_every_difference_from_math_verify_is_told() -> None:
    rows = [row for row in read_table() if row.reward == "accuracy"]
    rewards = math_verify_reward(
        [row.completion for row in rows], answer=[row.gold for row in rows]
    )
    shown = ["none" if reward is None else str(int(reward)) for reward in rewards]
    assert [row for row, text in zip(rows, shown, strict=True) if row.math_verify != text] == []
    wrong = [
        row for row in rows if (row.difference == "-") != (float(row.math_verify) == row.verdict)
    ]
    assert wrong == []


def test_the_last_box_after_the_thought_counts() -> None:
    texts = [
        r"\boxed{99}, no: \boxed{72}",
        r"<think>\boxed{9}</think> \boxed{72}",
        r"<think>\boxed{72}</think> no idea",
        r"so $72$ at last",
        r"\boxed{72} then \boxed{99}",
    ]
    assert math_verify_reward(texts, answer=["72"] * 5) == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_golds_are_chosen_as_by_accuracy() -> None:
    texts = [r"\boxed{\sqrt{4}}"] * 4
    golds = [["3", "2"], "", None, ["3"]]
    assert math_verify_reward(texts, golds, ["9", "2", None, ""]) == [1.0, 1.0, None, 0.0]
