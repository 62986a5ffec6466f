"""Tasks and rewards that lean on other packages; skipped where these are not installed."""

from __future__ import annotations

import importlib.util

import pytest

from localrl.errors import ConfigError
from localrl.processes.worker import Worker
from localrl.rewards.catalog import parse_rewards
from localrl.settings import TaskConfig
from localrl.tasks.loading import open_task


@pytest.fixture(scope="module")
def worker():
    with Worker(time_limit_s=60, memory_limit_bytes=None) as worker:
        yield worker


def installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.skipif(installed("reasoning_gym"), reason="reasoning-gym is installed")
def test_a_missing_package_is_named(worker):
    with pytest.raises(ConfigError, match=r"pip install 'localrl\[gym\]'"):
        open_task(TaskConfig(name="gym:chain_sum"), (), worker)


@pytest.mark.skipif(not installed("reasoning_gym"), reason="needs localrl[gym]")
def test_reasoning_gym_scores_its_own_answers(worker):
    task = open_task(TaskConfig(name="gym:chain_sum", train_prompts=20), (), worker)
    assert task.train_size == 20
    held_out = task.evaluation(5)
    assert held_out
    assert not {e.id for e in held_out} & {task.train(i).id for i in range(20)}
    example = task.train(0)
    (spec,) = task.rewards
    columns = {"gym": ["chain_sum"] * 3, "index": [example.columns["index"]] * 3}
    answers = [example.answer, f"so <answer> {example.answer} </answer>", "none"]
    reply = worker.call(spec.target, {"completions": answers, **columns})
    assert reply.value[:2] == [1.0, 1.0]
    assert reply.value[2] < 1
    with pytest.raises(ConfigError, match="nonsense"):
        open_task(TaskConfig(name="gym:nonsense"), (), worker)


@pytest.mark.skipif(not installed("math_verify"), reason="needs localrl[math]")
def test_math_verify_reads_latex(worker):
    (spec,) = parse_rewards(["math_verify"])
    answers = [r"so \boxed{\frac{1}{2}}", "it is $0.5$", "3", r"\boxed{2}"]
    golds = ["1/2", r"\frac{1}{2}", "1/2", ""]
    reply = worker.call(spec.target, {"completions": answers, "answer": golds})
    assert reply.value == [1.0, 1.0, 0.0, None]
