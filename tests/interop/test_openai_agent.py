"""Agents that call the model with the real openai package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai")

from localrl.agents.agents import open_agents
from localrl.agents.conversations import AgentLimits
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.policy.model import load_model
from localrl.processes.worker import Worker
from localrl.rewards.in_process import InProcess
from localrl.rewards.scoring import Scorer
from localrl.rollouts.agents import AgentTurns
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups
from localrl.rollouts.turns import Turns
from localrl.tasks.builtin import load_task
from localrl.tasks.environments import open_environments

AGENTS = Path(__file__).with_name("openai_agent.py")
LIMITS = AgentLimits(calls=4, prompt_tokens=200, seconds=300.0)


@pytest.fixture(scope="module")
def policy():
    loaded = load_model(embedded_model_path("turns-0.1m"))
    return make_policy(loaded, rank=2, scale=1.0, seed=0, for_cpu=True, dense=True)


@pytest.fixture(scope="module")
def worker():
    with Worker(time_limit_s=300.0, memory_limit_bytes=None) as worker:
        yield worker


def sample(policy, turns, examples, prompts=()):
    return sample_groups(
        Decoder(policy, temperature=1.0, rows=64),
        examples,
        prompts,
        Shape(3, 3),
        rule=None,
        max_completion_tokens=80,
        seed=1,
        step=2,
        version=0,
        turns=turns,
    )


def run(policy, worker, name, examples):
    agents = open_agents(f"{AGENTS}:{name}", worker, LIMITS, warn=print, beat=lambda work: None)
    agents.connect(policy.tokenizer)
    try:
        groups = sample(policy, AgentTurns(agents.begin, agents.answer), examples)
        scorer = Scorer([agents.reward], InProcess(worker, outcomes=agents.outcomes))
        return groups, [scored.rewards for scored in scorer.score(groups)]
    finally:
        agents.close()


@pytest.mark.parametrize("name", ["guess", "guess_streaming", "guess_async"])
def test_an_agent_plays_as_the_environment_does(policy, worker, name):
    task = load_task("guessing", train_prompts=0)
    examples = [task.train(n) for n in range(4)]
    environments = open_environments(task.environment, (), worker, limit_s=60.0, warn=print)
    assert environments is not None
    environments.connect(policy.tokenizer)
    prompts = environments.prompts(examples)
    known = sample(policy, Turns(environments.answer, 4), examples, prompts)
    rewards = [scored.rewards for scored in Scorer(environments.rewards, worker).score(known)]
    groups, own = run(policy, worker, name, examples)
    assert own == rewards
    for one, other in zip(known, groups, strict=True):
        for i in range(3):
            here, there = one.completion(i), other.completion(i)
            np.testing.assert_array_equal(here.token_ids, there.token_ids)
            np.testing.assert_array_equal(here.sampled, there.sampled)


def test_tool_calls_are_objects_of_the_client(policy, worker):
    task = load_task("calculator", train_prompts=0)
    groups, _ = run(policy, worker, "calculate", [task.train(n) for n in range(6)])
    leaves = [leaf for group in groups for leaf in group.leaves]
    assert all(leaf.finish_reason != "error" for leaf in leaves)
    several = [
        g.completion(i) for g in groups for i in range(3) if not g.completion(i).sampled.all()
    ]
    assert several  # the tool was called, and its result read
    assert all(not leaf.beside for leaf in leaves)


def test_another_key_is_refused(policy, worker):
    task = load_task("guessing", train_prompts=0)
    groups, _ = run(policy, worker, "refused", [task.train(0)])
    assert all(leaf.text.startswith("refused: Error code: 401") for leaf in groups[0].leaves)
    assert all(len(group.completion(0)) == 0 for group in groups)
