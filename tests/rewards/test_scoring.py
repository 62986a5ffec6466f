"""Scoring by real reward functions in a real worker, the hostile ones included."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import DEADLINE_S

from localrl.errors import ConfigError, DataError, RewardError
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Leaf, Node
from localrl.rewards.scoring import HOPELESS_CALLS, MIN_CALLS, Counts, Scorer

FUNCTIONS = Path(__file__).with_name("hostile.py")


@dataclass(frozen=True)
class Spec:
    name: str
    target: str
    weight: float = 1.0


def spec(name: str, weight: float = 1.0) -> Spec:
    return Spec(name, f"{FUNCTIONS}:{name}", weight)


def node(parent: int, *tokens: int) -> Node:
    n = len(tokens)
    zeros = np.zeros(n, np.float32)
    return Node(parent, np.array(tokens, np.int32), np.ones(n, bool), zeros, zeros)


def group(texts: Sequence[str] = "ab", *, answer: Any = "a", **columns: Any) -> Group:
    """A tree: the first token is shared, then one leaf for each letter."""
    return Group(
        example=Example("x", ({"role": "user", "content": "sort"},), answer, columns),
        prompt_ids=(9,),
        nodes=(node(-1, 1), *(node(0, 2 + i) for i in range(len(texts)))),
        leaves=tuple(Leaf(1 + i, "stop", text) for i, text in enumerate(texts)),
        planned_roots=1,
    )


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit_s=DEADLINE_S, memory_limit_bytes=200 << 20) as worker:
        worker.resolve(spec("length").target)
        yield worker


@pytest.fixture(scope="module")
def hasty() -> Iterator[Worker]:
    """One that does not wait long."""
    with Worker(time_limit_s=1.0, memory_limit_bytes=200 << 20) as worker:
        worker.resolve(spec("length").target)
        yield worker


def test_groups_get_their_own_rewards(worker: Worker) -> None:
    groups = [group("abc", answer="b"), group("a", answer="a"), group("", answer="a")]
    scored = Scorer([spec("right")], worker).score(groups)
    assert [s.rewards for s in scored] == [(0.0, 1.0, 0.0), (1.0,), ()]
    assert [s.group for s in scored] == groups
    assert all(isinstance(reward, float) for reward in scored[0].rewards)


def test_functions_see_prompts_as_the_model_does(worker: Worker) -> None:
    specs = [spec("prompt_lengths"), Spec("t", "localrl.rewards.shaping:think_format_reward")]
    scorer = Scorer(specs, worker)
    scorer.check([])
    scorer.render = lambda ids: f"{ids[0]}<think>"
    [scored] = scorer.score([group(["a</think>b", "ab"])])
    assert scored.parts == {"prompt_lengths": (8.0, 8.0), "t": (1.0, 0.0)}


def test_parts_are_weighted_and_none_is_left_out(worker: Worker) -> None:
    specs = [spec("right", 2.0), spec("only_first", -0.5), spec("not_applicable", 9.0)]
    [scored] = Scorer(specs, worker).score([group("ab")])
    assert scored.parts == {
        "right": (1.0, 0.0),
        "only_first": (3.0, None),
        "not_applicable": (None, None),
    }
    assert scored.rewards == (2.0 * 1 - 0.5 * 3, 0.0)


@pytest.mark.parametrize(
    ("cut_reward", "rewards"),
    [
        (None, (1.0, 1.0, 1.0, 0.0, 1.0)),
        (-0.5, (1.0, -0.5, -0.5, 0.0, 1.0)),
        (0.0, (1, 0, 0, 0, 1)),
    ],
)
def test_completions_cut_off_get_a_reward_of_their_own(
    worker: Worker, cut_reward: float | None, rewards: tuple[float, ...]
) -> None:
    reasons = ("stop", "length", "loop", "stop", "closed")
    plain = group("aaaba")
    leaves = [replace(leaf, finish_reason=r) for leaf, r in zip(plain.leaves, reasons, strict=True)]
    scorer = Scorer([spec("right")], worker, cut_reward=cut_reward)
    [scored] = scorer.score([replace(plain, leaves=tuple(leaves))])  # type: ignore[arg-type]
    assert scored.rewards == rewards
    assert scored.parts == {"right": (1.0, 1.0, 1.0, 0.0, 1.0)}  # what the function said


def test_completions_cut_off_need_no_answer_of_the_functions(worker: Worker) -> None:
    cut = tuple(replace(leaf, finish_reason="length") for leaf in group("ab").leaves)
    groups = [replace(group("ab"), leaves=cut), group("ab")]
    scored = Scorer([spec("not_applicable")], worker, cut_reward=-1.0).score(groups)
    assert [s.rewards for s in scored] == [(-1.0, -1.0), (None, None)]


def test_the_time_of_scoring_adds_up(worker: Worker) -> None:
    scorer, started = Scorer([spec("length")], worker), time.perf_counter()
    assert scorer.busy_s == 0.0
    scorer.score([group("ab")])
    once = scorer.busy_s
    scorer.score([group("ab")])
    assert 0 < once < scorer.busy_s < time.perf_counter() - started


def test_no_part_no_reward_and_no_failure(worker: Worker) -> None:
    scorer = Scorer([spec("not_applicable")], worker)
    assert scorer.score([group("ab")])[0].rewards == (None, None)
    assert scorer.counts == {"not_applicable": Counts(calls=1, failures=0)}


def test_trl_arguments(worker: Worker) -> None:
    [scored] = Scorer([spec("everything")], worker).score([group("ab", level=4.0)])
    assert scored.rewards == (1.0, 1.0)


def test_missing_columns_are_none_and_answer_may_be_a_column(worker: Worker) -> None:
    groups = [group("a", level=0.5), group("a", answer=None), group("a", answer=None)]
    groups[1].example.columns["answer"] = "a"  # type: ignore[index]
    scored = Scorer([spec("level"), spec("right")], worker).score(groups)
    assert [s.parts["level"] for s in scored] == [(0.5,), (None,), (None,)]
    assert [s.parts["right"] for s in scored] == [(1.0,), (1.0,), (0.0,)]


@pytest.mark.parametrize("name", ["right_later", "numpy_floats"])
def test_async_functions_and_arrays(worker: Worker, name: str) -> None:
    [scored] = Scorer([spec(name)], worker).score([group("ba")])
    assert scored.rewards == (0.0, 1.0)


def test_nothing_to_score_is_no_call(worker: Worker) -> None:
    scorer = Scorer([spec("raises")], worker)
    assert scorer.score([]) == []
    assert scorer.score([group("")])[0].rewards == ()
    assert scorer.counts["raises"].calls == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "raised: ZeroDivisionError: division by zero"),
        ("hangs", "timeout: gave no answer within the limit of 1 s"),
        ("too_few", "it returned 1 values for 2 completions"),
        ("one_number", "it returned 1.0, not a list of 2 numbers"),
        ("dies", "died: its process exited with status 0"),
        ("exits", "raised: SystemExit: 0"),
        ("hogs_memory", "the limit is 210 MB"),
        ("asks", "raised: EOFError"),
        ("needs_a_column", "missing 1 required positional argument: 'ground_truth'"),
    ],
)
def test_failed_call_is_no_reward_and_the_next_works(
    worker: Worker, hasty: Worker, name: str, told: str
) -> None:
    worker = hasty if name == "hangs" else worker
    said: list[str] = []
    scorer = Scorer([spec(name), spec("length")], worker, said.append)
    for _ in range(2):
        [scored] = scorer.score([group("ab")])
        assert scored.parts == {name: (None, None), "length": (1.0, 1.0)}
        assert scored.rewards == (1.0, 1.0)
    assert scorer.counts == {name: Counts(2, 2), "length": Counts(2, 0)}
    assert len(said) == 1
    assert f"Reward {name!r}" in said[0]
    assert told in said[0]


@pytest.mark.parametrize(
    ("name", "told"), [("nan", "nan"), ("infinite", "inf"), ("text", "'1.0'"), ("huge", "10000")]
)
def test_one_bad_value_costs_one_completion(worker: Worker, name: str, told: str) -> None:
    said: list[str] = []
    scorer = Scorer([spec(name)], worker, said.append)
    assert scorer.score([group("ab"), group("c")])[1].rewards == (1.0,)
    assert scorer.score([group("ab")])[0].rewards == (None, 1.0)
    assert scorer.counts[name] == Counts(2, 2)
    assert len(said) == 1
    assert f"it returned {told}" in said[0]
    assert "1 of 3 completions" in said[0]


@pytest.mark.parametrize("name", ["prints", "leaves_a_thread"])
def test_bad_manners_are_not_failures(worker: Worker, name: str) -> None:
    scorer = Scorer([spec(name), spec("length")], worker)
    for _ in range(2):
        assert scorer.score([group("ab")])[0].rewards == (2.0, 2.0)
    assert scorer.counts[name] == Counts(2, 0)


def test_hopeless_function_stops_the_run_with_its_traceback(worker: Worker) -> None:
    scorer = Scorer([spec("raises")], worker, lambda line: None)
    for _ in range(HOPELESS_CALLS - 1):
        scorer.score([group("ab")])
    with pytest.raises(RewardError, match=r"100% of the completions in its last 3") as error:
        scorer.score([group("ab")])
    assert "hostile.py" in str(error.value)
    assert "return 1 / 0" in str(error.value)


def score_levels(worker: Worker, levels: list[int]) -> None:
    """One call for each level; a level above 0 makes it fail."""
    scorer = Scorer([spec("fails_at_level")], worker, lambda line: None)
    for level in levels:
        scorer.score([group("a", level=level)])


def test_tolerated_share_of_failures(worker: Worker) -> None:
    at_first = [0, 0, 1, 2, 3] + [0] * (MIN_CALLS - 5)
    score_levels(worker, at_first[:-1])  # 3 of 9 are too many, but 9 calls are too few to tell
    with pytest.raises(RewardError, match=r"(?s)30% of .* last 10 calls.*ValueError: level 1"):
        score_levels(worker, at_first)
    score_levels(worker, [0, 0, 0, 0, 1] * 12)
    score_levels(worker, [0] * 100 + [1] * 10)
    with pytest.raises(RewardError, match=r"22% of .* last 50 calls"):
        score_levels(worker, [0] * 100 + [1] * 11)


def test_a_few_bad_values_among_many_are_tolerated(worker: Worker) -> None:
    scorer = Scorer([spec("nan")], worker, lambda line: None)
    for _ in range(2 * MIN_CALLS):
        scorer.score([group("abcdef")])
    assert scorer.counts["nan"].failures == 2 * MIN_CALLS


def test_check_accepts_what_works(worker: Worker) -> None:
    Scorer([spec("needs_a_column"), spec("everything")], worker).check(["ground_truth"])
    Scorer([spec("needs_a_column")], worker).check()


def test_check_names_what_is_missing(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lost' .*has no 'lost'.*path/to/file\.py:function"):
        Scorer([spec("lost")], worker).check()
    with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
        Scorer([Spec("r", "no_such_module:f")], worker).check()
    with pytest.raises(ConfigError, match="needs the column 'ground_truth'; this task has answ"):
        Scorer([spec("needs_a_column")], worker).check(["level"])
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    with pytest.raises(DataError, match=r"(?s)No module named 'no_such_library'.*broken\.py"):
        Scorer([Spec("r", f"{tmp_path}/broken.py:f")], worker).check()


def test_bad_settings_are_refused(worker: Worker) -> None:
    with pytest.raises(ConfigError, match="No reward function"):
        Scorer([], worker)
    with pytest.raises(ConfigError, match="different names"):
        Scorer([spec("length"), spec("length")], worker)
    with pytest.raises(ConfigError, match="weight nan"):
        Scorer([spec("length", float("nan"))], worker)


def test_unsendable_column_is_named(worker: Worker) -> None:
    with pytest.raises(DataError, match="the argument 'level'"):
        Scorer([spec("length")], worker).score([group("a", level={1, 2})])


def test_a_step_that_is_done_again_leaves_no_calls_of_its_first_try(worker: Worker) -> None:
    scorer = Scorer([spec("length")], worker)
    scorer.score([group("ab")])
    before = scorer.tallies()
    scorer.score([group("ab")])
    scorer.restore(before)
    assert scorer.tallies() == before


def test_scoring_takes_little_more_than_a_call(worker: Worker) -> None:
    scorer, arguments = Scorer([spec("length")], worker), {"completions": ["a", "b"]}
    scored = best_of(lambda: scorer.score([group("ab")]))
    called = best_of(lambda: worker.call(spec("length").target, arguments))
    assert scored < 10 * called


def best_of(work: Callable[[], object]) -> float:
    """Seconds of the quickest of many."""
    found = []
    for _ in range(100):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
