"""What is an answer and what is none: a table of cases, and numbers in every frame."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from answer_table import Row, read_table
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.rewards.accuracy import accuracy_reward, choice_reward
from localrl.rewards.json_answers import json_reward

REWARDS = {"accuracy": accuracy_reward, "choice": choice_reward, "json": json_reward}
TABLE = read_table()
MANY = settings(max_examples=60, deadline=None, derandomize=True)


def rewards(rows: list[Row]) -> list[float | None]:
    return [REWARDS[r.reward]([r.completion], answer=[r.gold])[0] for r in rows]


@pytest.mark.parametrize("kind", dict.fromkeys(row.kind for row in TABLE))
def test_the_table(kind: str) -> None:
    rows = [row for row in TABLE if row.kind == kind]
    pairs = zip(rows, rewards(rows), strict=True)
    assert [(*row, found) for row, found in pairs if found != row.verdict] == []


def test_the_table_is_large_and_even() -> None:
    assert len({(row.reward, str(row.gold), row.completion) for row in TABLE}) == len(TABLE) >= 300
    kinds = Counter(row.kind for row in TABLE)
    assert min(kinds.values()) >= 5, kinds
    assert all(row.reason and row.difference for row in TABLE)


FRAMES = (
    "{}",
    "The answer is {}.",
    "The answer is ${}$.",
    "It is 3 or 4.\n#### {}",
    "<answer>{}</answer>",
    "<answer>\n{}\n</answer>",
    "Work: 17. So \\boxed{{{}}}",
    "**Answer:** {}",
    "So we get {}.",
    "The final answer is ${}$. I hope it is correct.",
    "Answer:\n$$\n{}\n$$",
    "<think>I guess 3</think>\nThe answer is **{}**",
)
EQUAL = (
    "{n}",
    "{n}.0",
    "{n:,}",
    "{n} apples",
    "{n}\\text{{ cm}}",
    "\\frac{{{twice}}}{{2}}",
    "{twice}/2",
    "x = {n}",
    "1 + {less} = {n}",
    "({n})",
)
NO_NUMBERS = (
    *("{n}x", "{n}\\pi", "{n} y", "{n}!", "{n}^2", "2^{{{n}}}", "\\sqrt{{{n}}}", "\u221a{n}"),
    *("x > {n}", "x \\le {n}", "not {n}", "2*{n}", "2 \\cdot {n}", "9 - {n}", "{n} - x"),
    *("\\log({n})", "\\frac{{x}}{{{n}}}", "\\frac{{\\sqrt3}}{{{n}}}", "{n} million", "{n}M"),
    *("{n} or {less}", "{less}, {n}", "({less}, {n})", "{less}:{n}", "between 1 and {n}"),
    *("half of {n}", "\\frac{{\\frac{{1}}{{3}}}}{{{n}}}", "2x = {n}", "|x| = {n}", "{n} i"),
)


def score(text: str, gold: Any) -> float | None:
    return accuracy_reward([text], answer=[gold])[0]


def written(form: str, n: int) -> str:
    return form.format(n=n, twice=2 * n, less=n - 1)


@MANY
@given(st.sampled_from(FRAMES), st.sampled_from(EQUAL), st.integers(5, 10**7))
def test_a_number_is_found_in_every_frame(frame: str, form: str, n: int) -> None:
    if "=" in form and "boxed" in frame and "+" in form:
        return  # a box holds the answer alone
    text = frame.format(written(form, n))
    assert (score(text, str(n)), score(text, n + 1)) == (1.0, 0.0), text


@settings(MANY, max_examples=200)
@given(st.sampled_from(FRAMES), st.sampled_from(NO_NUMBERS), st.integers(5, 10**7))
def test_no_part_of_an_expression_is_a_number(frame: str, form: str, n: int) -> None:
    text = frame.format(written(form, n))
    assert score(text, str(n)) == 0.0, text


@MANY
@given(st.sampled_from(FRAMES[1:7]), st.text("abc dxyz'-", max_size=20), st.integers(0, 99))
def test_nothing_before_a_statement_without_a_number_is_taken(
    frame: str, words: str, n: int
) -> None:
    assert score(f"It is {n}. " + frame.format(words), n) == 0.0


@MANY
@given(st.sampled_from("ABCDEFGH"), st.sampled_from(["", ")", " because it fits", ", Paris", "."]))
def test_a_stated_letter_counts_whatever_follows(letter: str, rest: str) -> None:
    for lead in ("The answer is ", "Answer: ", "The correct option is ", "I choose ", "So it is\n"):
        text = f"{lead}{letter}{rest}"
        if lead.startswith("So") and rest not in ("", ")", "."):
            continue  # not stated
        assert choice_reward([text], answer=[letter]) == [1.0], text
        other = "ABCDEFGHA"["ABCDEFGH".index(letter) + 1]
        assert choice_reward([text], answer=[other]) == [0.0], text


@MANY
@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1))
def test_json_with_a_key_twice_is_never_right(value: dict[str, Any]) -> None:
    text, key = json.dumps(value), next(iter(value))
    assert json_reward([text], answer=[value]) == [1.0]
    twice = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value[key])}}}"
    assert json_reward([twice, f"so: {twice}"], answer=[value] * 2) == [0.0, 0.0]
