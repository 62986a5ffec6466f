"""A user's TRL reward file, unchanged: the numbers of localrl and those of a real GRPOTrainer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chat_rewards
import numpy as np
import pytest
import text_rewards
import tiny
import trl_trainer
from trl_trainer import Row, Scored, run_trl, tokens_of

from localrl import RunConfig, train
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Leaf, Node, ScoredGroup
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.logs import Logs
from localrl.rewards.scoring import Scorer
from localrl.runs.logs import read_jsonl
from localrl.runs.metrics import rollout_metrics

STATISTICS = ("mean", "std")
TEXT = [
    Row(
        "What is 2+2?",
        (r"It is \boxed{4}.", "", r"\boxed{5}", r"\boxed{4} and ?"),
        {"task": "math", "ground_truth": "4"},
    ),
    Row(
        "Add two numbers.",
        ("return a + b", "a + b", r"\boxed{return}", "?"),
        {"task": "coding", "ground_truth": "return"},
    ),
    Row(
        "Say hello.",
        ("hello", "Hello!\nHello!", "", "good-bye"),
        {"task": "talk", "ground_truth": None},
    ),
]
CHAT = [
    Row(
        [{"role": "system", "content": "Think."}, {"role": "user", "content": "Is 7 prime?"}],
        (
            "<think>yes</think><answer>Yes</answer>",
            "<think>yes\n</think><answer>Yes</answer>",
            "Yes",
            "<think></think><answer></answer> ",
        ),
        {"answer": "Yes"},
    ),
    Row(
        [{"role": "user", "content": "And 9?"}],
        ("No", "no", "<think>3*3</think><answer>No</answer>", "yes"),
        {"answer": None},
    ),
]


def score(
    rows: Sequence[Row],
    module: Any,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    state: dict[str, Any] | None = None,
) -> tuple[list[ScoredGroup], Logs]:
    """The same through localrl: the file is named as on its command line."""
    specs = parse_rewards([f"{module.__file__}:{name}" for name in names], weights)
    with Worker(time_limit_s=30.0, memory_limit_bytes=None) as worker:
        scorer = Scorer(specs, worker)
        scorer.check(rows[0].columns)
        scored = scorer.score([_group(i, row) for i, row in enumerate(rows)], state)
        assert all(counts.failures == 0 for counts in scorer.counts.values())
        return scored, scorer.take_logs()


def _group(index: int, row: Row) -> Group:
    as_text = isinstance(row.prompt, str)
    messages = [{"role": "user", "content": row.prompt}] if as_text else row.prompt
    return Group(
        example=Example(f"row-{index}", tuple(messages), None, row.columns, as_text),
        prompt_ids=(2,),
        nodes=tuple(_node(tokens_of(text)) for text in row.completions),
        leaves=tuple(Leaf(i, "stop", text) for i, text in enumerate(row.completions)),
        planned_roots=len(row.completions),
    )


def _node(tokens: list[int]) -> Node:
    zeros = np.zeros(len(tokens), np.float32)
    return Node(-1, np.array(tokens, np.int32), np.ones(len(tokens), bool), zeros, zeros)


def same(ours: Sequence[ScoredGroup], theirs: Scored) -> None:
    """Each function's number to the last bit of float32, the sums, and the means under one name."""
    names = list(ours[0].parts)
    rows = [row for group in ours for row in zip(*group.parts.values(), strict=True)]
    assert [[_float32(part) for part in row] for row in rows] == theirs.parts
    advantages = [a for group in ours for a in _above_the_mean(group.rewards)]
    np.testing.assert_allclose(advantages, theirs.advantages, atol=2e-6)
    metrics = rollout_metrics(ours)
    for name in ["reward", "reward_std", *(f"rewards/{n}/{m}" for n in names for m in STATISTICS)]:
        logged = theirs.logged[name]
        known = None if math.isnan(logged) else pytest.approx(logged, rel=1e-6)
        assert metrics[name] == known, name


def _above_the_mean(rewards: Sequence[float | None]) -> list[float]:
    known = [reward for reward in rewards if reward is not None]
    return [0.0 if reward is None else reward - np.mean(known) for reward in rewards]


def _float32(part: float | None) -> float | None:
    return None if part is None else float(np.float32(part))


def both(
    folder: Path,
    rows: Sequence[Row],
    module: Any,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
) -> tuple[list[ScoredGroup], Logs, Scored]:
    [theirs] = run_trl(folder, rows, [getattr(module, name) for name in names], weights=weights)
    ours, logs = score(rows, module, names, weights)
    same(ours, theirs)
    return ours, logs, theirs


def test_functions_for_text_prompts(tmp_path: Path) -> None:
    names = [
        "more_tokens",
        "more_characters",
        "boxed_truth",
        "for_math",
        "for_code",
        "not_empty",
        "third_of_length",
    ]
    weights = [0.1, -0.5, 1.0, 2.0, 3.0, 0.7, 1.3]
    ours, _, _ = both(tmp_path, TEXT, text_rewards, names, weights)
    assert ours[0].parts["boxed_truth"] == (1.0, 0.0, 0.0, 1.0)
    assert ours[0].parts["more_tokens"] == (17.0, 1.0, 10.0, 16.0)
    assert ours[2].parts["for_math"] == (None,) * 4


def test_what_no_function_judges_is_left_out(tmp_path: Path) -> None:
    """Example 4 of TRL's page with a row of a third kind."""
    ours, _, theirs = both(tmp_path, TEXT, text_rewards, ["for_math", "for_code"], [1.0, 2.0])
    assert [group.rewards for group in ours] == [
        (1.0, -1.0, -1.0, 1.0),
        (2.0, -2.0, 2.0, -2.0),
        (None,) * 4,
    ]
    assert theirs.advantages[-4:] == [0.0] * 4


def test_functions_for_chat_prompts(tmp_path: Path) -> None:
    names = ["think_then_answer", "unique_characters", "right_answer", "whole_numbers"]
    ours, _, _ = both(tmp_path, CHAT, chat_rewards, names)
    assert ours[0].parts["think_then_answer"] == (1.0, 0.0, 0.0, 0.0)
    assert ours[0].parts["right_answer"] == (1.0, 1.0, 1.0, 0.0)
    assert ours[1].parts["right_answer"] == (None,) * 4


def test_what_functions_log(tmp_path: Path) -> None:
    _, logs, theirs = both(tmp_path, TEXT, text_rewards, ["logged"])
    assert logs.means()["accuracy"] == pytest.approx(theirs.logged["accuracy"])
    rows = [logs.of(_group(i, row)) for i, row in enumerate(TEXT)]
    columns = {
        name: [leaf[name] for row in rows for leaf in row]
        for name in ("golden_answer", "extracted_answer")
    }
    assert columns == theirs.extra


def test_trainer_state_says_the_same_in_each_step(tmp_path: Path) -> None:
    """The states are those that `localrl train` tells: see the next test."""
    names = ["curriculum", "where_it_stands"]
    functions = [getattr(text_rewards, name) for name in names]
    steps = run_trl(tmp_path, TEXT, functions, steps=3)
    for done, theirs in enumerate(steps):
        state = {"global_step": done, "max_steps": 3, "epoch": float(done)}
        ours, logs = score(TEXT, text_rewards, names, state=state)
        same(ours, theirs)
        for name, value in logs.means().items():
            assert theirs.logged[name] == value, name


def test_a_run_tells_these_states_and_its_evaluations_fail_nowhere(tmp_path: Path) -> None:
    """`curriculum` divides by `max_steps`, so the evaluation before the first step has it too."""
    sizes = {"characters": tiny.PRINTABLE, "vocab_size": 128}
    model = tiny.make_folder(tmp_path / "model", **sizes)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": f"{i}", "prompt": row.prompt, **row.columns} for i, row in enumerate(TEXT)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "test.jsonl").write_text('{"prompt": "What is 3+3?"}')
    settings = {
        "model.path": str(model),
        "task.name": str(data),
        "task.rewards": [f"{text_rewards.__file__}:{n}" for n in ("curriculum", "where_it_stands")],
        "rollout.prompts_per_step": 3,
        "rollout.max_completion_tokens": 8,
        "run.steps": 3,
        "run.out": str(tmp_path / "run"),
    }
    train(RunConfig.create(settings))
    lines = [m for m in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in m]
    seen = [(m["seen_step"], m["seen_max_steps"], m["seen_epoch"]) for m in lines]
    assert seen == [(0, 3, 0.0), (1, 3, 1.0), (2, 3, 2.0)]
    assert lines[-1]["rewards/failures"] == 0


def test_the_helper_gives_what_it_was_told_to() -> None:
    """A tokenizer that lost characters would give both sides the same wrong text."""
    tokenizer = trl_trainer.make_tokenizer()
    for row in (*TEXT, *CHAT):
        for text in row.completions:
            assert tokenizer.decode(tokens_of(text), skip_special_tokens=True) == text
