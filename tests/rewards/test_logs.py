"""Functions written for TRL run unchanged: arguments, state, logging, event loop."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrl.errors import DataError
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Leaf, Node
from localrl.rewards.logs import LogCollector
from localrl.rewards.scoring import Counts, Scorer

FUNCTIONS = Path(__file__).with_name("trl_style.py")


@dataclass(frozen=True)
class Spec:
    name: str
    target: str
    weight: float = 1.0
    seconds_each: float | None = None


def spec(name: str) -> Spec:
    return Spec(name, f"{FUNCTIONS}:{name}")


def group(*texts: str, name: str = "x", prompt: str = "2+3", **columns: Any) -> Group:
    zeros = np.zeros(2, np.float32)
    nodes = [Node(-1, np.arange(2, dtype=np.int32), np.ones(2, bool), zeros, zeros) for _ in texts]
    return Group(
        example=Example(name, ({"role": "user", "content": prompt},), None, columns),
        prompt_ids=(9,),
        nodes=tuple(nodes),
        leaves=tuple(Leaf(i, "stop", text) for i, text in enumerate(texts)),
        planned_roots=len(texts),
    )


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit_s=20.0, memory_limit_bytes=None) as worker:
        yield worker


def parts(worker: Worker, name: str, *groups: Group) -> list[float | None]:
    scored = Scorer([spec(name)], worker).score(groups)
    return [value for group in scored for value in group.parts[name]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unique_characters", [2.0, 3.0]),
        ("token_count", [2.0, 2.0]),
        ("echoes_prompt", [0.0, 1.0]),
        ("matches_column", [1.0, 0.0]),
        ("only_for_math", [1.0, 1.0]),
        ("waits", [0.5, 0.5]),
    ],
)
def test_trl_functions_run_unchanged(worker: Worker, name: str, expected: list[float]) -> None:
    data = group("5 5", "2+3", ground_truth="5", task="math")
    assert parts(worker, name, data) == expected
    assert parts(worker, name, data) == expected


def test_none_from_a_function_of_another_task_is_no_failure(worker: Worker) -> None:
    groups = [group("a", task="code"), group("b", task="math"), group("c")]
    scorer = Scorer([spec("only_for_math")], worker)
    assert [s.rewards for s in scorer.score(groups)] == [(None,), (1.0,), (None,)]
    assert scorer.counts == {"only_for_math": Counts(1, 0)}


def test_async_functions_keep_their_loop_even_after_a_failure(worker: Worker) -> None:
    assert parts(worker, "waits", group("a")) == [0.5]
    assert parts(worker, "raises_later", group("a")) == [None]
    assert parts(worker, "waits", group("a")) == [0.5]


def test_trainer_state_has_attributes(worker: Worker) -> None:
    scorer = Scorer([spec("curriculum")], worker)
    assert scorer.score([group("a")])[0].rewards == (0.0,)
    scorer.state = {"global_step": 5, "max_steps": 20, "epoch": None}
    assert scorer.score([group("a")])[0].rewards == (0.25,)
    given = {"global_step": 10, "max_steps": 20, "epoch": 1.5}
    assert scorer.score([group("a")], given)[0].rewards == (2.0,)


def test_trl_arguments_are_known_to_the_check(worker: Worker) -> None:
    Scorer([spec("curriculum"), spec("logs")], worker).check(["ground_truth"])


def test_plain_text_for_data_whose_prompts_are_text(worker: Worker) -> None:
    scorer, asked = Scorer([spec("plain_length")], worker), group("abc", prompt="12345")
    asked = replace(asked, example=replace(asked.example, as_text=True))
    assert scorer.score([asked])[0].rewards == (8.0,)


def test_logs_reach_metrics_and_leaves(worker: Worker) -> None:
    first = group("5", "", name="first", ground_truth="5")
    second = group("7", name="second", ground_truth="8")
    scorer = Scorer([spec("logs"), spec("logs_by_keywords")], worker)
    scorer.score([first, second])
    logs = scorer.take_logs()
    assert logs.metrics == {"accuracy": [1 / 3, 1.0]}
    assert logs.means() == {"accuracy": pytest.approx(2 / 3)}
    assert logs.of(first) == [
        {"gold": "5", "found": "5", "place": 0},
        {"gold": "5", "found": "[none]", "place": 1},
    ]
    assert logs.of(second) == [{"gold": "8", "found": "7", "place": 2}]
    assert logs.of(group("5", name="third")) == [{}]
    assert not scorer.take_logs().metrics


def test_logs_of_several_calls_come_together(worker: Worker) -> None:
    scorer = Scorer([spec("logs")], worker)
    scorer.score([group("5", ground_truth="5")])
    scorer.score([group("6", ground_truth="5")])
    logs = scorer.take_logs()
    assert logs.metrics == {"accuracy": [1.0, 0.0]}
    merged = logs.of(group("5", "6", ground_truth="5"))
    assert [row["found"] for row in merged] == ["5", "6"]


def test_what_cannot_be_logged_is_dropped_with_one_warning(worker: Worker) -> None:
    said: list[str] = []
    scorer = Scorer([spec("logs_oddly")], worker, said.append)
    data = [group("a", "b", score=1.0)]
    for _ in range(2):
        assert scorer.score(data)[0].rewards == (1.0, 1.0)
    assert scorer.counts["logs_oddly"].failures == 0
    logs = scorer.take_logs()
    assert logs.metrics == {"fine": [2.0, 2.0]}
    assert logs.of(data[0]) == [
        {"strange": "{1}", "nested": {"a": None}},
        {"strange": None, "nested": "b'bytes'"},
    ]
    assert len(said) == 3
    assert "the metric 'broken' as nan; the entry was dropped" in said[0]
    assert "'exact'" in said[1]
    assert "1 values in the column 'short' for 2 completions; the entry was dropped" in said[2]


def test_a_failed_call_logs_nothing_and_arrays_are_fine(worker: Worker) -> None:
    scorer = Scorer([spec("logs_then_raises"), spec("numpy_logs")], worker, lambda line: None)
    data = group("a", "b")
    assert scorer.score([data])[0].rewards == (0.0, 0.0)
    logs = scorer.take_logs()
    assert logs.metrics == {"numpy": [0.5]}
    assert logs.of(data) == [{"numpy": 0}, {"numpy": 1}]


def test_mean_of_huge_numbers_is_a_number() -> None:
    collector = LogCollector(print)
    collector.add("f", {"metrics": [("m", 1.7e308), ("m", 1.7e308)]}, [])
    assert collector.take().means() == {"m": 1.7e308}


def test_only_what_is_named_is_sent(worker: Worker) -> None:
    target = spec("names_nothing_big").target
    assert worker.wants(target, "prompts")
    assert not worker.wants(target, "completion_ids")
    assert worker.wants(spec("token_count").target, "anything")  # it takes **kwargs
    assert worker.wants("/nowhere.py:f", "anything")
    assert worker.call(target, {"prompts": ["a"], "unsendable": {1}}).value == [0.0]
    with pytest.raises(DataError, match="'prompts'"):
        worker.call(target, {"prompts": {1}})


def test_without_a_state_nothing_is_offered(worker: Worker) -> None:
    reply = worker.call(spec("curriculum").target, {"completions": []})
    assert "missing 1 required positional argument: 'trainer_state'" in reply.message


def test_factories_are_called_once_for_their_arguments(worker: Worker) -> None:
    target = f"{FUNCTIONS}:make(offset=-2, pattern='(a:b)')"
    first = worker.call(target, {"completions": ["a"]}).value
    assert worker.call(target, {"completions": ["a"]}).value == first
    assert first == [pytest.approx(-2 + 5 + 0.01)]
    assert worker.call(f"{FUNCTIONS}:make()", {"completions": ["a"]}).value == [0.02]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("make(1)", "not of the form (key=value"),
        ("make(offset=)", "not of the form (key=value"),
        ("make(**{})", "not of the form (key=value"),
        ("make(offset=1)(x=2)", "not of the form (key=value"),
        ("make(offset=1, offset=2)", "not of the form (key=value"),
        ("make(offset=open('x'))", "the value of 'offset' is not a literal"),
        ("make(size=1)", "cannot be called: got an unexpected keyword argument 'size'"),
        ("make_badly()", "cannot be called: missing a required argument: 'size'"),
        ("make_badly(size=2)", "rejected its arguments: size is 2"),
        ("make_nothing()", "returned a value of type int, not a function"),
        ("lost(size=2)", "has no 'lost'"),
    ],
)
def test_bad_factory_calls_are_told(worker: Worker, call: str, message: str) -> None:
    reply = worker.resolve(f"{FUNCTIONS}:{call}")
    assert not reply.ok
    assert message in reply.message
    assert reply.traceback is None
