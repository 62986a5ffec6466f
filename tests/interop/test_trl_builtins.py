"""Built-in rewards that bear TRL's names, beside TRL's own on the same inputs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import trl.rewards
import trl_trainer
from test_trl_functions import _group

from localrl.processes.worker import Worker
from localrl.records import Group
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.scoring import Scorer


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit_s=60.0, memory_limit_bytes=None) as worker:
        yield worker


def ours(worker: Worker, name: str, texts: Sequence[str], **columns: Any) -> list[float | None]:
    """What the reward of this name gives for completions, each to a prompt of its own."""
    scored = Scorer(parse_rewards([name]), worker).score(_groups(texts, columns))
    return [reward for group in scored for reward in group.rewards]


def _groups(texts: Sequence[str], columns: dict[str, Sequence[Any]]) -> list[Group]:
    prompt = [{"role": "user", "content": "?"}]
    return [
        _group(i, trl_trainer.Row(prompt, (text,), {name: c[i] for name, c in columns.items()}))
        for i, text in enumerate(texts)
    ]


def chats(texts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def ids_of(texts: Sequence[str]) -> list[list[int]]:
    return [trl_trainer.tokens_of(text) for text in texts]


# Lengths, repetition and tags: the same numbers to the last bit.

WORDS = [("ab" * n)[:n] for n in range(40)] + ["abc" * 13, "a", "", "abcabd", "x" * 90]


@pytest.mark.parametrize(("longest", "cache"), [(30, 10), (30, 0), (30, 30), (7, 3), (2, 2)])
def test_soft_overlong_punishment(worker: Worker, longest: int, cache: int) -> None:
    settings = f"max_completion_len={longest}, soft_punish_cache={cache}"
    theirs = trl.rewards.get_soft_overlong_punishment(longest, cache)(completion_ids=ids_of(WORDS))
    assert len(set(theirs)) > 1
    for name in ("soft_overlong", "get_soft_overlong_punishment"):
        assert ours(worker, f"{name}({settings})", WORDS) == theirs


@pytest.mark.parametrize(("size", "penalty"), [(3, -1.0), (1, -0.3), (2, -2.5), (5, 0.0), (90, -1)])
def test_repetition_penalty(worker: Worker, size: int, penalty: float) -> None:
    draws = random.Random(size)
    texts = WORDS + ["".join(draws.choices("abcd", k=draws.randrange(60))) for _ in range(100)]
    theirs = trl.rewards.get_repetition_penalty_reward(size, penalty)(completion_ids=ids_of(texts))
    settings = f"(ngram_size={size}, max_penalty={penalty})"
    assert ours(worker, f"repetition{settings}", texts) == theirs
    assert ours(worker, f"get_repetition_penalty_reward{settings}", texts) == theirs


def test_think_format(worker: Worker) -> None:
    draws, parts = random.Random(5), ["<think>", "</think>", "\n", "a", " ", "<think", "think>"]
    texts = ["".join(draws.choices(parts, k=draws.randrange(7))) for _ in range(500)]
    texts += [f"<think>{text}" for text in texts[:300]]
    theirs = trl.rewards.think_format_reward(completions=chats(texts))
    assert 50 < sum(theirs) < 750
    assert ours(worker, "think_format_reward", texts) == theirs


# Answers. Both read a number in LaTeX alike, however it is written and wherever it stands.

FRAMES = [
    "\\boxed{%s}",
    "So it is $\\boxed{%s}$.",
    "<think>well, 12</think>\nThe result: \\[\\boxed{%s}\\]",
    "We get 3 and then \\boxed{ %s }",
    "I think that\n\n$$\\boxed{%s}$$\n",
    "The final answer is $%s$. I hope it is correct.",
    "\\boxed{%s \\text{ cm}}",
    "\\boxed{\\$%s}",
    "\\boxed{%s} apples",
    "\\fbox{5} I do not know %.0s",
    "\\boxed{} %.0s",
    "%.0s",
]


def _number(draws: random.Random) -> list[str]:
    """The same number in several forms."""
    kind = draws.choice(["small", "large", "decimal", "fraction"])
    if kind == "decimal":
        value = draws.randrange(-(10**5), 10**5) / 10 ** draws.randrange(1, 4)
        return [f"{value}", f"{value}0"]
    if kind == "fraction":
        top, bottom, sign = draws.randrange(1, 60), draws.randrange(2, 30), draws.choice(["", "-"])
        doubled = f"{sign}\\dfrac{{{2 * top}}}{{{2 * bottom}}}"
        return [f"{sign}\\frac{{{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}", doubled]
    value = draws.randrange(-99, 100) if kind == "small" else draws.randrange(-(10**6), 10**6)
    return [f"{value}", f"{value:,}", f"{value}.0"]


def _numbers(count: int) -> tuple[list[str], list[str]]:
    """Completions, and gold answers of which about half are what they say."""
    draws = random.Random(7)
    texts, golds = [], []
    for _ in range(count):
        forms = _number(draws)
        said = draws.choice(forms if draws.random() < 0.6 else _number(draws))
        texts.append(draws.choice(FRAMES) % said)
        gold = draws.choice(forms)
        bare = [] if "dfrac" in gold else ["%s"]  # one of the differences below
        golds.append(draws.choice(["$%s$", "\\boxed{%s}", *bare]) % gold)
    return texts, golds


def test_numbers_in_latex_are_judged_alike(worker: Worker) -> None:
    texts, golds = _numbers(600)
    theirs = trl.rewards.accuracy_reward(completions=chats(texts), solution=golds)
    assert 150 < sum(theirs) < 450
    for name in ("accuracy", "accuracy_reward"):
        assert _different(ours(worker, name, texts, solution=golds), theirs, texts, golds) == []


def test_reasoning_is_cut_off_alike(worker: Worker) -> None:
    texts, golds = _numbers(300)
    heads = ["", "<think>\\boxed{1} 2", "<think>\\boxed{1}</think>", "</think> 3 </think>"]
    texts = [random.Random(i).choice(heads) + text for i, text in enumerate(texts)]
    theirs = trl.rewards.reasoning_accuracy_reward(completions=chats(texts), solution=golds)
    assert 50 < sum(theirs) < 200
    mine = ours(worker, "reasoning_accuracy_reward", texts, solution=golds)
    assert _different(mine, theirs, texts, golds) == []


@pytest.mark.parametrize("settings", [{"max_len": 20}, {"max_len": 40, "max_value_correct": 3.0}])
def test_cosine_scaled(worker: Worker, settings: dict[str, Any]) -> None:
    texts, golds = _numbers(200)
    reward = trl.rewards.get_cosine_scaled_reward(**settings)
    theirs = reward(chats(texts), golds, ids_of(texts))
    assert len(set(theirs)) > 15
    arguments = ", ".join(f"{name}={value}" for name, value in settings.items())
    mine = ours(worker, f"get_cosine_scaled_reward({arguments})", texts, solution=golds)
    assert mine == theirs


# Where the two differ, and nowhere else; docs/rewards.md tells of every line of this list.

DIFFERENCES = {
    "an answer without LaTeX": [
        ("72", "72", 0, 1),
        ("The answer is 72.", "72", 0, 1),
        ("#### 72", "72", 0, 1),
        ("<answer>72</answer>", "72", 0, 1),
        ("$72$", "72", 0, 1),
        (r"The answer is \boxed{72", "72", 0, 1),
        ("The answer is 71.", "72", 0, 0),
    ],
    "several boxes: the last, or all": [
        (r"\boxed{99}, no: \boxed{72}", "72", 0, 1),
        (r"\boxed{72}, no: \boxed{99}", "72", 0, 0),
        (r"<think>\boxed{9}</think> \boxed{72}", "72", 0, 1),
        (r"\boxed{72}, so \boxed{72}", "72", 1, 1),
    ],
    "a gold answer without $ that is no plain number": [
        (r"\boxed{0.5}", r"\dfrac{1}{2}", None, 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1, 1),
        (r"\boxed{B}", "B", None, 1),
        (r"\boxed{C}", "B", None, 0),
        (r"\boxed{Paris}", "Paris", None, 1),
        (r"\boxed{x+1}", "x+1", None, 1),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}", None, 1),
        (r"\boxed{x+1}", "$x+1$", 1, 1),
        (r"\boxed{\text{B}}", "$B$", 1, 1),
    ],
    "algebra": [
        (r"\boxed{\sqrt{4}}", "2", 1, 0),
        (r"\boxed{36+36}", "72", 1, 0),
        (r"\boxed{1+x}", "$x+1$", 1, 0),
        (r"\boxed{\{2,1\}}", r"$\{1,2\}$", 1, 1),
    ],
    "decimals that are nearly equal": [
        (r"\boxed{0.3333333}", r"\frac{1}{3}", 1, 0),
        (r"\boxed{0.1000001}", "0.1", 1, 0),
        (r"\boxed{0.33}", r"\frac{1}{3}", 0, 0),
    ],
    "20% is 20, and for TRL 0.2 as well": [
        (r"\boxed{0.2}", "20%", 1, 0),
        (r"\boxed{20\%}", "0.2", 1, 0),
        (r"\boxed{20\%}", "20", 1, 1),
        (r"\boxed{20}", "20%", 1, 1),
    ],
    "units that contradict": [
        (r"\boxed{5\text{ m}}", "5 cm", 1, 0),
        (r"\boxed{5\text{ cm}}", "5", 1, 1),
    ],
    "forms of a number that math-verify does not read": [
        (r"\boxed{1.5e3}", "1500", 0, 1),
        (r"\boxed{1\,000}", "1000", 0, 1),
        (r"\boxed{\frac12}", "0.5", 0, 1),
        (r"\boxed{72.}", "72", 0, 1),
        (r"\boxed{x = 1,000}", "1000", 0, 1),
    ],
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_differences_are_those_that_are_told(worker: Worker, kind: str) -> None:
    texts, golds, expected, own = (list(column) for column in zip(*DIFFERENCES[kind], strict=True))
    theirs = trl.rewards.accuracy_reward(completions=chats(texts), solution=golds)
    assert theirs == expected
    assert ours(worker, "accuracy_reward", texts, solution=golds) == own
    assert own != expected


def test_trl_s_own_functions_run_by_their_names(worker: Worker) -> None:
    """Whoever needs math-verify names TRL's function; it runs in the child as it is."""
    rows = [row for kind in DIFFERENCES.values() for row in kind]
    texts, golds, expected = (
        [row[0] for row in rows],
        [row[1] for row in rows],
        [r[2] for r in rows],
    )
    assert ours(worker, "trl.rewards.accuracy_reward", texts, solution=golds) == expected
    settings = "max_completion_len=30, soft_punish_cache=10"
    made = f"trl.rewards:get_soft_overlong_punishment({settings})"
    assert ours(worker, made, WORDS) == ours(worker, f"soft_overlong({settings})", WORDS)


def test_names_are_those_of_trl() -> None:
    factories = {
        "get_soft_overlong_punishment(max_completion_len=9, soft_punish_cache=1)": (9, 1),
        "get_repetition_penalty_reward()": (),
        "get_cosine_scaled_reward(max_len=9)": (9,),
    }
    for text, settings in factories.items():
        made = getattr(trl.rewards, text.partition("(")[0])(*settings)
        assert parse_rewards([text])[0].name == made.__name__
    for name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"):
        assert parse_rewards([name])[0].name == getattr(trl.rewards, name).__name__


def _different(
    mine: Sequence[Any], theirs: Sequence[Any], texts: Sequence[str], golds: Sequence[str]
) -> list[tuple[Any, ...]]:
    rows = zip(mine, theirs, texts, golds, strict=True)
    return [row for row in rows if row[0] != row[1]]


def test_fractions_of_the_generator_are_what_they_say() -> None:
    """The forms of one number are equal, or the comparison above would be of wrong answers only."""
    draws = random.Random(1)
    for _ in range(100):
        values = set()
        for form in _number(draws):
            plain = form.replace("\\dfrac", "\\frac").replace(",", "")
            plain = plain.replace("\\frac{", "").replace("}{", "/").replace("}", "")
            values.add(Fraction(plain))
        assert len(values) == 1
        assert math.isfinite(values.pop())
