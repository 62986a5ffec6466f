"""Agents as sources of completions: what they get, what is recorded, and how they may fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrl.agents.agents import CHILD, open_agents
from localrl.agents.conversations import AgentLimits
from localrl.config import LearningConfig
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.errors import ConfigError, DataError, RewardError
from localrl.learning.credit import assign_credit, token_coefficients
from localrl.learning.objectives import make_objective
from localrl.learning.selection import select
from localrl.policy.model import load_model
from localrl.policy.packing import forest_batches, row_batches
from localrl.policy.scoring import group_logprobs
from localrl.processes.worker import Worker
from localrl.records import RewardSpec, ScoredGroup
from localrl.rewards.in_process import InProcess
from localrl.rewards.scoring import Scorer
from localrl.rollouts.agents import AgentTurns
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, join, sample_groups
from localrl.rollouts.turns import Turns
from localrl.tasks.builtin import load_task
from localrl.tasks.environments import open_environments

sys.path.append(str(Path(__file__).parent))
from programs import MANNERS

PROGRAMS = Path(__file__).with_name("programs.py")
GUESSING = load_task("guessing", train_prompts=0)
THREE = Shape(3, 3)
LIMITS = AgentLimits(calls=4, prompt_tokens=100, seconds=300.0)


@pytest.fixture(scope="module")
def policy():
    """The model that ships with localrl and talks in turns."""
    loaded = load_model(embedded_model_path("turns-0.1m"))
    return make_policy(loaded, rank=2, scale=1.0, seed=0, for_cpu=True, dense=True)


@pytest.fixture(scope="module")
def worker():
    with Worker(time_limit_s=300.0, memory_limit_bytes=None) as worker:
        yield worker


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def run(policy, worker, warnings) -> Iterator[Any]:
    """Completions of agents that run a function of `programs`."""
    opened = []

    def sample(name, examples, shape=THREE, longest=60, round=0, **limits):
        agents = open_agents(
            f"{PROGRAMS}:{name}",
            worker,
            replace(LIMITS, **limits),
            warn=warnings.append,
            beat=lambda work: None,
        )
        agents.connect(policy.tokenizer)
        opened.append(agents)
        return sample_with(policy, AgentTurns(agents.begin, agents.answer), examples, shape,
                           longest, round)  # fmt: skip

    def rewards(groups, *before):
        """The groups' rewards: what the agents returned last, after other rewards were asked."""
        scorer = Scorer(
            [*before, opened[-1].reward],
            InProcess(worker, outcomes=opened[-1].outcomes),
            warnings.append,
        )
        return [scored.rewards for scored in scorer.score(groups)]

    sample.rewards = rewards  # pyright: ignore[reportFunctionMemberAccess]
    yield sample
    for agents in opened:
        agents.close()


def sample_with(policy, turns, examples, shape, longest, round=0, prompts=()):
    return sample_groups(
        Decoder(policy, temperature=1.0, rows=64),
        examples,
        prompts,
        shape,
        rule=None,
        max_completion_tokens=longest,
        seed=1,
        step=2,
        version=3,
        round=round,
        turns=turns,
    )


def problems(manners):
    """Examples that tell an agent how to behave."""
    return [replace(GUESSING.train(n), answer=manner) for n, manner in enumerate(manners)]


def written(group, index):
    completion = group.completion(index)
    return completion.token_ids.tolist(), completion.sampled.tolist()


def test_an_agent_that_does_what_an_environment_does_gets_the_same(policy, worker, run):
    examples = [GUESSING.train(n) for n in range(3)]
    environments = open_environments(GUESSING.environment, (), worker, limit_s=60.0, warn=print)
    assert environments is not None
    environments.connect(policy.tokenizer)
    prompts = environments.prompts(examples)
    known = sample_with(policy, Turns(environments.answer, 4), examples, THREE, 60,
                        prompts=prompts)  # fmt: skip
    scorer = Scorer(environments.rewards, worker)
    rewards = [scored.rewards for scored in scorer.score(known)]
    groups = run("guess", examples)
    assert run.rewards(groups) == rewards
    for one, other in zip(known, groups, strict=True):
        assert one.prompt_ids == other.prompt_ids
        for i in range(3):
            assert written(one, i) == written(other, i)
            np.testing.assert_allclose(
                one.completion(i).sampled_logprobs, other.completion(i).sampled_logprobs, atol=1e-5
            )
            assert one.leaves[i].text == other.leaves[i].text
            said = [message["content"] for message in other.leaves[i].messages]
            assert said == [message["content"] for message in one.leaves[i].messages][: len(said)]
    assert any(not all(written(group, i)[1]) for group in groups for i in range(3))


def test_each_way_to_fail(run, worker, warnings):
    groups = run("behave", problems(MANNERS), Shape(1, 1), longest=40, seconds=1.0)
    ends = {manner: group.leaves[0] for manner, group in zip(MANNERS, groups, strict=True)}
    failed = {"raises", "hangs", "odd", "exits", "stuck"}
    assert {manner for manner, leaf in ends.items() if leaf.finish_reason == "error"} == failed
    assert ends["chatty"].finish_reason == "turns"
    assert ends["wordy"].finish_reason == "length"
    # Refused once, it went on, up to a limit of its own.
    assert ends["goes on"].finish_reason == "stop"
    assert all(len(group.completion(0)) <= 40 for group in groups)
    assert len(groups[MANNERS.index("silent")].completion(0)) == 0
    # An earlier reward may kill the process that the agents ran in.
    killer = RewardSpec("killer", f"{PROGRAMS}:kills")
    rewards = [first for first, *_ in run.rewards(groups, killer)]
    own = {"plain": 1.0, "silent": 0.25, "goes on": 1.0}
    assert rewards == [own.get(manner) for manner in MANNERS]
    assert warnings[0].startswith("The agent broke: ValueError: on purpose. 5 of ")
    assert "died" in warnings[1]
    assert len(warnings) == 2


def test_a_dead_process_fails_its_agents_and_the_next_ones_work(policy, worker, run, warnings):
    agents = open_agents(
        f"{PROGRAMS}:guess", worker, LIMITS, warn=warnings.append, beat=lambda work: None
    )
    agents.connect(policy.tokenizer)

    def dies(turns):
        worker.close()
        return agents.answer(turns)

    examples = [GUESSING.train(n) for n in range(2)]
    groups = sample_with(policy, AgentTurns(agents.begin, dies), examples, Shape(2, 2), 60)
    agents.close()
    assert {leaf.finish_reason for group in groups for leaf in group.leaves} <= {"error", "stop"}
    assert "error" in {leaf.finish_reason for group in groups for leaf in group.leaves}
    assert "its process is gone" in warnings[0]
    again = run("guess", examples, Shape(2, 2))
    assert all(leaf.finish_reason != "error" for group in again for leaf in group.leaves)


def test_too_many_failures_end_the_run(run):
    with pytest.raises(RewardError, match="broke in 100% of the last 51 completions") as caught:
        run("behave", problems(["raises"] * 17))
    assert "on purpose" in str(caught.value)
    assert "programs.py" in str(caught.value)  # the traceback of the user's frames


def test_tools_of_the_agent_and_messages_that_it_returns(run, policy):
    task = load_task("calculator", train_prompts=0)
    groups = run("calculate", [task.train(n) for n in range(6)])
    called = 0
    for group in groups:
        for i, leaf in enumerate(group.leaves):
            assert leaf.finish_reason != "error"
            assert leaf.messages[0]["role"] == "assistant"
            assert not leaf.beside  # a call after a tool's result continues the conversation
            ids, sampled = written(group, i)
            calls = leaf.messages[0].get("tool_calls", ())
            called += len(calls)
            assert all(sampled) != bool(calls)
            if calls:
                foreign = [token for token, own in zip(ids, sampled, strict=True) if not own]
                expression = json.loads(calls[0]["function"]["arguments"])["expression"]
                assert expression.count("*") == 1
                assert leaf.messages[1]["content"] in policy.tokenizer.decode(foreign)
    assert called


def rooms(run, policy):
    examples = [replace(GUESSING.train(n), answer=f"mark {n}") for n in range(2)]
    return examples, run("two_rooms", examples, Shape(2, 2))


def test_calls_that_continue_nothing_begin_sequences(run, policy):
    examples, groups = rooms(run, policy)
    for group, example in zip(groups, examples, strict=True):
        prompt = policy.tokenizer.encode(example.messages)
        assert 0 < len(group.prompt_ids) < len(prompt)
        for leaf in group.leaves:
            # Its first conversation went on twice: the second time from an earlier point.
            assert len(leaf.beside) == 2
            assert leaf.text.startswith(example.answer)  # agents do not see each other's state
            for end in (leaf.node, *leaf.beside):
                path = [group.nodes[n] for n in group.path(end)]
                whole = (*group.prompt_ids, *np.concatenate([n.token_ids for n in path]).tolist())
                assert whole[: len(prompt)] == prompt or end == leaf.beside[1]
            roots = [group.path(end)[0] for end in (leaf.node, *leaf.beside)]
            assert [group.nodes[n].cond_weight for n in roots] == [1, 0, 0]
        assert group.leaves[0].text != group.leaves[1].text


def test_what_is_sampled_is_what_is_scored_once(run, policy):
    _, groups = rooms(run, policy)
    for group in groups:
        now = group_logprobs(
            policy, [group], shared=True, micro_rows=8, head_chunk=64, temperature=1.0
        )[0]
        for node, logprobs in zip(group.nodes, now, strict=True):
            np.testing.assert_allclose(node.sampled_logprobs, logprobs * node.sampled, atol=1e-4)
        turns = [int(node.sampled.sum()) for node in group.nodes]
        assert sum(count > 0 for count in turns) == 4 * len(group.leaves)


def test_all_sequences_take_their_completions_credit_and_only_written_tokens_have_any(run, policy):
    _, groups = rooms(run, policy)
    scored = ScoredGroup(groups[0], (1.0, 0.0), {"r": (1.0, 0.0)})
    credit = assign_credit(scored)
    coefficients = token_coefficients(groups[0], credit)
    for leaf, advantage in zip(groups[0].leaves, (1.0, -1.0), strict=True):
        for n in groups[0].nodes_of(leaf):
            expected = np.where(groups[0].nodes[n].sampled, advantage / 2, 0.0)
            np.testing.assert_array_equal(coefficients[n], expected)
    assert any(not node.sampled.all() for node in groups[0].nodes)
    batch = select([scored], [credit], 1.0, make_objective(LearningConfig())).batch
    written = sum(int(node.sampled.sum()) for node in groups[0].nodes)
    for packed in (row_batches, forest_batches):
        assert sum(len(micro.targets) for micro in packed(batch, 64)) == written


def test_rounds_with_other_prompts_are_joined(run, policy):
    examples = [replace(GUESSING.train(0), answer="mark")]
    [first] = run("guess", [GUESSING.train(0)], Shape(1, 1, 2))
    [second] = run("two_rooms", examples, Shape(1, 1, 2), round=1)
    joined = join(*(ScoredGroup(group, (1.0,), {"r": (1.0,)}) for group in (first, second)))
    assert len(joined.group.prompt_ids) == min(len(first.prompt_ids), len(second.prompt_ids))
    for i, group in enumerate((first, second)):
        before, after = (g.completion(n) for g, n in ((group, 0), (joined.group, i)))
        assert after.sampled_logprobs.sum() == pytest.approx(before.sampled_logprobs.sum())
        prompts = len(joined.group.prompt_ids), len(group.prompt_ids)
        starts = [
            (*g.prompt_ids, *c.token_ids.tolist())[: prompts[1] + 2]
            for g, c in ((group, before), (joined.group, after))
        ]
        assert starts[0] == starts[1]


def test_streaming_logprobs_and_stop_texts(run):
    groups = run("streams", [GUESSING.train(n) for n in range(6)], Shape(2, 2))
    stopped = 0
    for group in groups:
        for i, leaf in enumerate(group.leaves):
            said, total, tokens = json.loads(leaf.text)
            completion = group.completion(i)
            ended = leaf.finish_reason == "stop"
            logprobs = completion.sampled_logprobs[: len(completion) - ended]
            assert total == pytest.approx(logprobs.sum(), abs=1e-4)
            assert "4" not in said
            assert tokens == said or tokens.startswith(f"{said}4")
            stopped += leaf.finish_reason == "closed"
    assert stopped


def test_nothing_is_loaded_and_nobody_else_is_answered(run, warnings):
    [group] = run("prowls", [GUESSING.train(0)], Shape(1, 1))
    assert group.leaves[0].text.startswith("401 401 410 400 400 400 400 ")
    assert len(group.leaves[0].messages) == 1
    assert len(group.nodes) == 1


def test_the_server_listens_on_loopback_alone(policy, worker):
    agents = open_agents(f"{PROGRAMS}:guess", worker, LIMITS, warn=print, beat=lambda work: None)
    agents.connect(policy.tokenizer)
    assert agents._listening.server_address[0] == "127.0.0.1"
    token = agents._listening.token
    agents.close()
    agents.connect(policy.tokenizer)
    assert agents._listening.token != token
    agents.close()


def test_functions_that_cannot_be_agents(worker, tmp_path):
    def opened(name):
        return open_agents(name, worker, LIMITS, warn=print, beat=lambda work: None)

    broken = tmp_path / "broken_agent.py"
    broken.write_text("raise ValueError('no')")
    with pytest.raises(ConfigError, match="needs 'messages'"):
        opened(f"{PROGRAMS}:ask")
    with pytest.raises(ConfigError, match=r"needs 'example'.* none of them before a /"):
        opened(f"{PROGRAMS}:unnamed")
    with pytest.raises(ConfigError, match=r"Name it as file\.py:function"):
        opened(f"{PROGRAMS}:nothing")
    with pytest.raises(DataError, match="Fix its module, then start again"):
        opened(f"{broken}:agent")


def test_a_module_has_the_time_of_a_start_and_failures_have_their_hints(tmp_path):
    slow, dies = tmp_path / "slow_agent.py", tmp_path / "dying_agent.py"
    slow.write_text("import time\ntime.sleep(0.8)\ndef run(example): ...")
    dies.write_text("import os\nos._exit(3)")
    with Worker(time_limit_s=0.6, memory_limit_bytes=None) as worker:
        worker.resolve(f"{CHILD}:check")  # imported already: what is measured is the module
        open_agents(f"{slow}:run", worker, LIMITS, warn=print, beat=lambda work: None)
        with pytest.raises(DataError, match=r"exited with status 3\. Fix its module"):
            open_agents(f"{dies}:run", worker, LIMITS, warn=print, beat=lambda work: None)
