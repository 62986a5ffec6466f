"""Completions end where their outcome is decided, and are otherwise the same."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from localrl import RunConfig, train
from localrl.errors import ConfigError, RewardError
from localrl.records import Example
from localrl.rollouts.batch import TreeRequest
from localrl.rollouts.decided import Decisions
from localrl.rollouts.decode import Decoder, LiveView
from localrl.runs.logs import read_jsonl

FORK = 6
SETTINGS = {
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 12,
    "rollout.max_prompt_tokens": 40,
    "task.eval_prompts": 8,
    "run.steps": 1,
}


@dataclass
class Fork:
    """Fork every path at one length."""

    def choose(self, view: LiveView):
        return view.alive & (view.lengths == FORK) & (view.leaves_left > 0)


def completions(policy, decisions, rows):
    """Return tokens and end of each path of trees that fork once."""
    example = Example(id="a", messages=({"role": "user", "content": "zebra 99"},))
    prompts = [policy.tokenizer.encode(example.messages)]
    request = TreeRequest(0, (0, 1, "a"), roots=4, leaves=8, max_tokens=20, example=example)
    decoder = Decoder(policy, 1.0, rows, decisions=decisions)
    segments = decoder.decode(prompts, [request], Fork())
    found = {}
    for n, segment in enumerate(segments):
        before = found[segment.parent][0] if segment.parent >= 0 else []
        found[n] = ([*before, *segment.token_ids.tolist()], segment.end)
    return [one for one in found.values() if one[1] != "fork"]


@pytest.mark.exact
def test_completions_end_at_the_deciding_token_before_and_after_forks(policy):
    free, asked = completions(policy, None, 8), []

    def decide(groups):
        asked.extend(groups)
        return [len(set(group.leaves[0].text)) > 7 for group in groups]

    ended = completions(policy, Decisions(decide, policy.tokenizer), 8)
    read, lengths = policy.tokenizer.decode, set()
    for ids, end in ended:
        assert any(whole[: len(ids)] == ids for whole, _ in free)
        assert (end == "decided") == (len(set(read(ids))) > 7)
        assert len(set(read(ids[:-1]))) <= 7
        lengths.add(len(ids) > FORK)
    assert True in lengths
    assert {end for _, end in ended} >= {"decided"}
    assert all(group.completion(0).token_ids.tolist() for group in asked)


def run(tiny_folder, tmp_path, body, **changes):
    """Train a step with a function of this body, and return the result."""
    (tmp_path / "rules.py").write_text(f"def rule(completions, answer, **columns):\n    {body}\n")
    settings = {"model.path": str(tiny_folder), "run.out": str(tmp_path / "run"), **SETTINGS}
    rule = {"task.decided": f"{tmp_path / 'rules.py'}:rule"}
    return train(RunConfig.create(settings | rule | changes), progress=False)


def test_the_function_is_called_as_a_reward_and_ends_completions_of_training(tiny_folder, tmp_path):
    body = "return [len(ids) >= 3 for ids, gold in zip(columns['completion_ids'], answer) if gold]"
    result = run(tiny_folder, tmp_path, body)
    groups = list(read_jsonl(result.folder / "rollouts.jsonl"))
    lengths = [
        (len(group["nodes"][i]["token_ids"]), leaf["finish_reason"] == "decided")
        for group in groups
        for i, leaf in enumerate(group["leaves"])
    ]
    assert all(length == 3 if decided else length <= 3 for length, decided in lengths)
    assert (3, True) in lengths
    assert result.adapter.mean_completion_tokens > 3.5


def test_a_function_that_only_fails_ends_the_run(tiny_folder, tmp_path):
    with pytest.raises(RewardError, match="rule"):
        run(tiny_folder, tmp_path, "raise ValueError('no rule')")


def test_an_environment_ends_its_own_completions(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="what ends a completion"):
        run(tiny_folder, tmp_path, "return []", **{"task.name": "guessing"})
