"""What of a judge's text is read as its verdict, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.rewards.verdicts import (
    Choices,
    Range,
    Unreadable,
    ask_ranking,
    read_ranking,
    read_scale,
)

READ = {
    "7": 0.7,
    "Score: 7": 0.7,
    "score:10": 1.0,
    "SCORE: 0": 0.0,
    "It is right, 3 of 4 steps too.\n\nScore: 7.5": 0.75,
    "**Score:** 7": 0.7,
    "**Score: 7**\n": 0.7,
    "### Score: `7`": 0.7,
    "7/10": 0.7,
    "Score: 7 / 10": 0.7,
    "Score: 7.": 0.7,
    "Score: 2\nNo, on second thought:\nScore: 7": 0.7,
    "<think>Score: 2\n</think>\nScore: 7": 0.7,
}
REFUSED = (
    "",
    "   \n\t",
    "seven",
    "Score: seven",
    "Score:",
    "Score: <number>",
    "11",
    "-1",
    "10.01",
    "7/5",
    "7/100",
    "70%",
    "7 out of 10",
    "7-8",
    "7 or 8",
    "7, 8",
    "7,5",
    "7e0",
    "nan",
    "inf",
    "\u0667",
    "0x7",
    "1 0",
    "Score: 7 points",
    "Score: Score: 7",
    "Rating: 7",
    "Score = 7",
    "I give it a 7",
    "Score: 7\nIs there anything else?",
    '{"score": 7}',
    "- 7",
    "99999999999999999999999999999999",
)
WRONG_SCALES = (
    *("", "10", "10-0", "5-5", "a-b", "0..10", "yes", "yes=1", "yes=1,no", "yes=1,YES=0"),
    *("=1,a=0", "yes=nan,no=0", "yes=1,no=x", "**yes**=1,no=0", "yes=1,no=0,"),
)
WRONG_RANKINGS = (
    *("3 > 1", "3 > 1 > 2 > 2", "3 > 1 > 4", "3, 1, 2", "A > B > C", "3 < 1 < 2", "0 > 1 > 2"),
    *("3 >> 1 > 2", "1 > 2 > 3 >", "> 1 > 2 > 3", "best: 3 > 1 > 2", "3"),
)


@pytest.mark.parametrize("text", READ)
def test_a_score_alone_on_the_last_line_is_read(text):
    assert Range(0, 10).read(text) == READ[text]


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused(text):
    with pytest.raises(Unreadable, match="its "):
        Range(0, 10).read(text)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(max_size=30))
def test_any_text_gives_a_reward_in_range_or_is_refused(text):
    for reader in (
        Range(-1, 1).read,
        Choices({"yes": 1.0, "no": 0.0}).read,
        lambda said: max(read_ranking(said, 3)),
    ):
        try:
            assert 0 <= reader(text) <= 1
        except Unreadable as error:
            assert len(str(error)) < 200  # noqa: PT017  (a refusal need not come)


def test_scales():
    assert read_scale("0-10") == Range(0, 10)
    assert read_scale(" 1 - 5 ") == Range(1, 5)
    assert read_scale("-1-1") == Range(-1, 1)
    assert read_scale("-2--1") == Range(-2, -1)
    assert read_scale("0.5-1.5").read("1") == 0.5
    assert read_scale("Yes=1, no=0") == Choices({"yes": 1.0, "no": 0.0})
    assert read_scale("A=1,B=0.5,neither of both=-1").read("Score: Neither of both") == -1
    for wrong in WRONG_SCALES:
        with pytest.raises(ValueError, match="scale is"):
            read_scale(wrong)


def test_a_choice_is_read_whole():
    choices = Choices({"good": 1.0, "very good": 2.0})
    assert choices.read("Score: Very Good.") == 2.0
    assert choices.read("**good**") == 1.0
    for text in (
        "not good",
        "good enough",
        "very",
        "goodgood",
        "good/very good",
        "bad",
        "good\nok",
    ):
        with pytest.raises(Unreadable, match="not one of good, very good"):
            choices.read(text)


def test_a_ranking_is_the_share_of_the_others_that_is_beaten():
    assert read_ranking("Ranking: 3 > 1 > 2", 3) == [0.5, 0.0, 1.0]
    assert read_ranking("why\n\n**Ranking:** 2=1 >3", 3) == [0.75, 0.75, 0.0]
    assert read_ranking("1=2=3=4", 4) == [0.5] * 4
    assert sum(read_ranking("4 > 1 = 3 > 2 = 5", 5)) == 2.5
    assert read_ranking(ask_ranking(12), 12) == [i / 11 for i in range(12)]
    for text in WRONG_RANKINGS:
        with pytest.raises(Unreadable):
            read_ranking(text, 3)
