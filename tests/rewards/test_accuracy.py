"""Right answers: numbers, letters, text, JSON; on garbage too, and quickly."""

import math
import random
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from localrl.rewards.accuracy import accuracy_reward, choice_reward, reasoning_accuracy_reward
from localrl.rewards.answers import final_answer
from localrl.rewards.extract import last_boxed
from localrl.rewards.json_answers import get_json_reward, json_reward
from localrl.rewards.last_numbers import last_number
from localrl.rewards.rational import read_number

SIZE = 10_000


def score(text: str, gold: Any) -> float | None:
    [reward] = accuracy_reward([[{"role": "assistant", "content": text}]], answer=[gold])
    return reward


def boxed(text: str) -> str:
    return f"Work: 17. So \\boxed{{{text}}}"


def test_trl_s_examples() -> None:
    thirds = [r"\frac{1}{3}"] * 2
    texts = [r"My answer is \boxed{\frac{1}{3}}", r"My answer is \boxed{\frac{1}{2}}"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert accuracy_reward(completions, thirds) == [1.0, 0.0]
    assert accuracy_reward(completions=completions, solution=thirds, trainer_state=1) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", 42),
        ("42.", "42"),
        ("42.0", "42"),
        ("+42", "42"),
        ("1,234,567", "1234567"),
        ("1{,}000", 1000),
        (r"1\,000", "1,000"),
        ("$18.00", "18"),
        (r"\$18", "18"),
        ("$18$", "18 dollars"),
        ("20%", "20"),
        (r"20\%", "20 percent"),
        ("-0.5", r"-\frac{1}{2}"),
        ("\u22120.5", "-1/2"),
        (r"\dfrac{2}{4}", 0.5),
        (r"\frac12", "0.50"),
        (r"\frac{-1}{2}", "-.5"),
        (r"1\frac{1}{2}", "3/2"),
        ("1 1/2", "1.5"),
        ("-1 1/2", "-1.5"),
        ("1.5e3", "1500"),
        (r"1.5 \times 10^{3}", "1500"),
        ("1.5*10^3", "1500"),
        (r"10^{-2}", "0.01"),
        (1e22, "10^22"),
        ("x = 5", "5"),
        (r"5\text{ cm}", "5"),
        ("5 cm", r"5\,\text{cm}"),
        ("5cm", "5 cm"),
        ("72 clips", "#### 72"),
        ("72", "48/2 = <<48/2=24>>24\n#### 72"),
        (r"90^\circ", "90 degrees"),
        ("**7**", "7"),
        ("{7}", "7"),
        ("\u00bd", "0.5"),
        ("5", r"Some proof. \boxed{4} then \boxed{5}"),
        (r"\sqrt{ 2 }", r"\sqrt{2}"),
        (r"\left( 1, \dfrac{1}{2} \right)", r"(1,\frac{1}{2})"),
        (r"\text{New York}", "new  york."),
        ("B", "(B)"),
        ("(b)", "B"),
        (r"\text{(B)}", "B."),
        ("B) Paris", "B"),
        ("TRUE", True),
    ],
)
def test_equal_answers(answer: Any, gold: Any) -> None:
    assert score(boxed(str(answer)), gold) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "43"),
        ("0.33", "1/3"),
        ("20%", "0.2"),
        ("5 cm", "5 m"),
        ("2x", "2"),
        (r"2\pi", "2"),
        ("3 million", "3"),
        ("5 or 6", "5"),
        ("(1,2)", "12"),
        ("1,2345", "12345"),
        ("2^{10}", "2"),
        ("10^{10^{10}}", "10"),
        ("C", "B"),
        ("Paris, France", "Paris"),
        ("", "5"),
        ("***", "a"),
        ("True", 1),
    ],
)
def test_different_answers(answer: str, gold: Any) -> None:
    assert score(boxed(answer), gold) == 0.0


@pytest.mark.parametrize("gold", [None, "", "  ", "***", [], [""], {}, [{}], "x" * 2001])
def test_gold_that_cannot_be_read_is_not_judged(gold: Any) -> None:
    assert score(boxed("5"), gold) is None


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("so 3 and 4 make 7", "7", 1.0),
        ("it is 5-3", "3", 0.0),
        ("it is -3", "-3", 1.0),
        ("7 is the answer, x2 is not", "7", 1.0),
        ("7 it is, not x^2 or 3^2", "7", 1.0),
        ("The answer is 7. I checked.", "7", 1.0),
        ("The answer is not clear\nbut 7", "7", 0.0),
        ("The answer is as follows:\n7", "7", 1.0),
        ("**Answer:**\n\n7", "7", 1.0),
        ("The answer is 7.\nWait, that is not right.", "7", 0.0),
        ("The answer is 7. I was wrong, it is 8.", "7", 0.0),
        ("The answer is 7. Actually no, 8.", "7", 0.0),
        ("The answer is 7. It is actually easy.", "7", 1.0),
        ("The answer is 7, since 6 would be wrong.", "7", 1.0),
        ("The answer is C.\nParis is actually large. They wait there.", "C", 1.0),
        ("The answer is C.\nWait, it is D.", "C", 0.0),
        ("<answer> 7 </answer> since 2+5 is 8", "7", 1.0),
        ("#### 7\n8", "7", 1.0),
        ("the answer is 8\n\\boxed{7} or 9", "7", 1.0),
        ("7</think> it is 8", "7", 0.0),
        ("no number", "7", 0.0),
        ("I am sure.\nParis.", "paris", 1.0),
        ("The answer is **Paris**.\nBye", "Paris", 1.0),
        ("Paris\nBye", "Paris", 0.0),
        ("The answer is (B).", "B", 1.0),
        ("(A) is wrong\nso (C) or (B)", "B", 0.0),
        ("(A) is wrong\nso it can only be (B)", "B", 1.0),
        ("B. Paris", "B", 1.0),
        ("A good idea", "A", 0.0),
        ("option b is right", "B", 1.0),
    ],
)
def test_answers_without_a_box(text: str, gold: str, reward: float) -> None:
    assert score(text, gold) == reward


def test_the_sign_before_a_fraction_in_a_sentence_is_read() -> None:
    for fraction in (r"-\frac{28}{14}", r"-\dfrac{4}{2}", r"-\frac42", "-4/2"):
        text = f"The final answer is ${fraction}$. I hope it is correct."
        assert (score(text, -2), score(text, 2)) == (1.0, 0.0), fraction
    # Behind a number or a letter it is a minus, and what follows is no number of its own.
    assert last_number(r"7-\frac{1}{2}") is last_number(r"x-\frac{1}{2}") is None


def test_boxes_nest_and_close() -> None:
    assert last_boxed(r"\boxed{a{b}\}c} \boxed{d") == r"a{b}\}c"
    assert last_boxed(r"\boxed{\boxed{5}}") == "5"
    assert last_boxed(r"{ \boxed {5}") == "5"
    assert last_boxed(r"\boxed 5") is None


def test_answer_comes_before_solution_wherever_it_can_be_read() -> None:
    assert accuracy_reward(["1", "2", "3"], [9, 2, None], ["1", None, ""]) == [1.0, 1.0, None]
    # As in data whose `solution` is empty or tells the whole way.
    words = "First we add, then we halve what we got."
    assert accuracy_reward(["7", "7"], ["", words], ["7", "7"]) == [1.0, 1.0]
    assert accuracy_reward(["7", "7"], ["7", "#### 7"], ["", {"no": "text"}]) == [1.0, 1.0]
    assert choice_reward(["B", "B"], ["B", "C"], ["words", ""]) == [1.0, 0.0]
    assert json_reward(["[1]"], ["no JSON"], ["[1]"]) == [1.0]
    assert reasoning_accuracy_reward(["</think>1"], ["2"], answer=["1"]) == [1.0]
    with pytest.raises(ValueError, match="neither a `solution` nor"):
        accuracy_reward(["1"])


@pytest.mark.parametrize(
    ("text", "golds", "reward"),
    [
        ("The answer is 7.", ["6", "7"], 1.0),
        ("The answer is 7.", ["seven", 7], 1.0),
        ("Paris", ["London", "paris", None], 1.0),
        ("The answer is Lyon", ["Paris", "Lyon"], 1.0),
        (r"\boxed{\sqrt2}", ["2", r"\sqrt{2}"], 1.0),
        ("The answer is 67.", ["6", "7"], 0.0),
        ("The answer is 6 or 7.", ["6", "7"], 0.0),
        ("7", ["", {}], None),
    ],
)
def test_a_list_holds_accepted_answers(text: str, golds: list[Any], reward: float | None) -> None:
    assert score(text, golds) == reward
    assert accuracy_reward([text], [golds], [""]) == [reward]


def test_other_rewards_take_lists_too() -> None:
    assert choice_reward(["B", "C", "A"], [["B", "(C) x"]] * 3) == [1.0, 1.0, 0.0]
    texts, golds = ["# 7", "# 7", "7", "#"], [["6", 7], "6", None, ""]
    rewards = final_answer(prompts=[], completions=texts, completion_ids=[], answer=golds)
    assert rewards == [1.0, 0.0, None, None]


def test_what_was_read_is_logged() -> None:
    logged: dict[str, list[Any]] = {}
    accuracy_reward(
        ["it is 1/2 or so", "?", "x"], ["0.50", "7 cm", None], log_extra=logged.__setitem__
    )
    assert logged == {
        "gold_parsed": ["1/2", "7 cm", None],
        "answer_parsed": ["1/2", None, None],
    }


def test_reasoning_is_taken_off() -> None:
    texts = [
        r"<think>r</think> \boxed{\frac{1}{3}}",
        r"<think>r</think> \boxed{\frac{1}{2}}",
        r"<think>\boxed{\frac{1}{3}}",
        r"\boxed{\frac{1}{3}} </think> none",
    ]
    assert reasoning_accuracy_reward(texts, [r"\frac{1}{3}"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert reasoning_accuracy_reward(["a|1|2", "1"], ["2", None], ["#", "|"]) == [1.0, 0.0]
    assert reasoning_accuracy_reward(["</think>1"], [None]) == [None]


def test_choices() -> None:
    texts = ["(b)", "The answer is A", "I take C.\nB) because", "none", r"\boxed{\text{B}}"]
    assert choice_reward(texts, ["B"] * 5) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert choice_reward(["B", "B"], solution=["(B) yes", "yes"]) == [1.0, None]


def renderings(value: Fraction, rng: random.Random) -> list[str]:
    """Different texts of one number."""
    n, d = value.numerator, value.denominator
    k, sign = rng.randint(1, 9), "-" if value < 0 else ""
    whole, rest = divmod(abs(n), d)
    texts = [f"{n * k}/{d * k}", rf"{sign}\frac{{{abs(n) * k}}}{{{d * k}}}", f"{n} / {d}"]
    if rest and whole:
        texts += [f"{sign}{whole} {rest * k}/{d * k}", rf"{sign}{whole}\dfrac{{{rest}}}{{{d}}}"]
    digits = d
    for prime in (2, 5):
        while digits % prime == 0:
            digits //= prime
    if digits == 1:
        shift = max(len(str(d)) * 4, 1)
        scaled = abs(n) * 10**shift // d
        text = f"{scaled // 10**shift}.{scaled % 10**shift:0{shift}d}"
        grouped = f"{scaled // 10**shift:,}.{scaled % 10**shift:0{shift}d}00"
        texts += [f"{sign}{text}", f"{sign}${grouped}", f"{sign}{scaled}e-{shift}"]
        texts.append(rf"{sign}{scaled} \times 10^{{-{shift}}}")
    return texts


def test_equal_rationals_are_equal_however_written() -> None:
    rng = random.Random(0)
    for _ in range(300):
        d = rng.choice([1, 2, 3, 4, 5, 7, 8, 10, 16, 25, 100, rng.randint(1, 999)])
        value = Fraction(rng.randint(-(10**6), 10**6), d)
        texts = renderings(value, rng)
        for text in texts:
            number = read_number(text)
            assert number is not None, text
            assert number.value == value, text
        one, other = rng.choice(texts), rng.choice(texts)
        assert score(boxed(one), other) == 1.0, (one, other)
        different = renderings(value + Fraction(1, rng.randint(1, 10**6)), rng)[0]
        assert score(boxed(different), one) == 0.0, (different, one)


def test_digits_and_exponents_are_bounded() -> None:
    assert read_number("9" * 1000) is not None
    assert read_number("9" * 1001) is None
    assert read_number("1e1000") is not None
    assert read_number("1e1001") is None
    assert read_number("1/0") is None
    assert last_number("1e999999999") is None


PIECES = [
    *("{", "}", "\\boxed{", "\\frac{", "\\frac{1}{", "\\text{", "\\", "10^{", "10^{10^{10}}"),
    *("1", "1,111", ",111", "1 ", "1/", ".", "-", "1e999999999", "* 10 ^ ", " ", "\n", "a", "*"),
    *("answer is ", "answer:", "<answer>", "####", "(A)", "(", "</think>", "<think>", "\u00bd"),
    *("so (B) ", "is ", "not ", "$5 ", "\\sqrt2", "1 000 ", "x = ", "5 kg per ", "\\{1,"),
    *("[", "[1,", "[{", '{"', '{"a":', '{"a" 1} ', '"', "`", "```\n", "```json\n[", "\ud800", "\0"),
]


def attempts(text: str) -> list[Callable[[], Any]]:
    return [
        *(lambda gold=gold: accuracy_reward([text], [gold]) for gold in ("42", "B", "Paris")),
        lambda: accuracy_reward(["42"], [text]),
        lambda: reasoning_accuracy_reward([text], ["42"]),
        lambda: choice_reward([text], ["B"]),
        lambda: json_reward([text], ["{}"]),
        lambda: json_reward(["{}"], [text]),
    ]


def seconds(call: Callable[[], Any]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_long(piece: str) -> None:
    repeated = (piece * SIZE)[:SIZE]
    for text in (repeated, f"\\boxed{{{repeated}"[:SIZE], f"1{repeated}1"):
        for call in attempts(text):
            assert min(seconds(call) for _ in range(3)) < 0.01


def test_garbage_never_raises() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 40)))
        for call in attempts(text):
            assert call()[0] in (0.0, 1.0, None), text


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ('{"a": 1.0, "b": [true]}', {"b": [True], "a": 1}, 1.0),
        ('{"a": 1}', '{"a": 1}', 1.0),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', {"a": 1}, 1.0),
        ("```{}``` then ```\n[1]\n``` and ```x```", [1], 1.0),
        ('First {"a": 2}, then {"a": {"b": [1]}}!', {"a": {"b": [1]}}, 1.0),
        ('{ is a brace; {"a": 1} is JSON', {"a": 1}, 1.0),
        ('<think>{"a": 2}</think> {"a": 1}', {"a": 1}, 1.0),
        ("42", 42, 1.0),
        ('"x"', '"x"', 1.0),
        ('{"a": true}', {"a": 1}, 0.0),
        ("[1, 2]", [2, 1], 0.0),
        ('{"a": 1, "b": 2}', {"a": 1}, 0.0),
        ("{'a': 1}", {"a": 1}, 0.0),
        ("NaN", 1, 0.0),
        ("no JSON", {"a": 1}, 0.0),
        ('{"a": 1}', None, None),
        ('{"a": 1}', "no JSON", None),
    ],
)
def test_json_answers(text: str, gold: Any, reward: float | None) -> None:
    assert json_reward([text], [gold]) == [reward]


SCHEMA = {
    "title": "a person",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", 1]}},
    },
    "required": ["name"],
    "additionalProperties": {"type": "number"},
}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"name": "x"}', 1.0),
        ('{"name": "x", "age": 3.0, "tags": ["a", 1.0], "more": 1.5}', 1.0),
        ('{"name": "x", "age": null}', 1.0),
        ('{"age": 3}', 0.0),
        ('{"name": 1}', 0.0),
        ('{"name": "x", "age": 3.5}', 0.0),
        ('{"name": "x", "age": true}', 0.0),
        ('{"name": "x", "tags": [true]}', 0.0),
        ('{"name": "x", "more": "y"}', 0.0),
        ("[]", 0.0),
        ("", 0.0),
    ],
)
def test_json_schema(text: str, reward: float) -> None:
    assert json_reward([text], schema=[SCHEMA]) == [reward]
    assert get_json_reward(SCHEMA)([text], answer=[None]) == [reward]


def test_json_with_gold_and_schema_needs_both() -> None:
    texts, golds = ["[1]", "[2]", '["a"]', "[1]"], [[1], [1], ["a"], None]
    schema = '{"items": {"type": "integer"}}'
    assert json_reward(texts, golds, schema=[schema] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert json_reward(["1", "1"], solution=[1, 2], schema=[None, False]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"minimum": 1}, "schema has the keyword 'minimum'; supported keywords are"),
        ({"properties": {"a": {"items": {"pattern": "x"}}}}, "schema.properties.a.items has the"),
        ({"items": [{}]}, r"schema.items is \[\{\}\]; a schema is"),
        ({"type": "int"}, "schema.type is 'int'; it must be one of"),
        ({"required": "a"}, "schema.required is 'a'; it must be a list"),
        ({"properties": []}, "schema.properties is"),
        ({"enum": 1}, "schema.enum is 1"),
        ("{", "is not JSON"),
        ([], "a schema is an object"),
    ],
)
def test_unsupported_schemas_are_errors(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_reward(["1"], schema=[schema])
    with pytest.raises(ValueError, match=message):
        get_json_reward(schema)


def test_odd_numbers_are_read_or_not_but_never_raise() -> None:
    assert score(boxed("5"), 10**5000) is None
    assert score(boxed("5"), math.nan) == 0.0
