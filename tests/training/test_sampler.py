"""Tokens that come back to a policy that has not moved, where the sampler rounds in 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from localrl import RunConfig, train
from localrl.policy.model import Policy
from localrl.policy.scoring import group_logprobs
from localrl.rollouts.batch import DecodeLog
from localrl.runs.logs import read_jsonl
from localrl.training import components
from localrl.training.sampler import Sampler

BF16 = 0.05
"""Standard deviation in nats of the sampler's record, as bfloat16 on a GPU: 0.04 in the mean."""
STILL = {
    "task.eval_prompts": 0,
    "task.train_prompts": 4,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 24,
    "learning.lr": 0.0,
    "run.steps": 3,
}
REUSE = STILL | {"rollout.reuse": 0.5}
REPLAY = STILL | {
    "rollout.prompt_order": "thompson",
    "task.train_prompts": 12,
    "rollout.replay_groups": 2,
    "rollout.replay_drift": 1e-4,
}


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch):
    """A run on a float32 model whose sampler's records have the noise of 16 bits."""
    draws, write = np.random.default_rng(0), DecodeLog.write

    def noisy(self, rows, tokens, logprobs, entropies):
        rounded = (logprobs + draws.normal(0, BF16, len(logprobs))).astype(np.float32)
        write(self, rows, tokens, rounded, entropies)

    def rounding(*arguments, **settings):
        """As once adapters have changed, however little: every pass rounds in its own way."""
        found = group_logprobs(*arguments, **settings)
        return [[(v + draws.normal(0, BF16, len(v))).astype(np.float32) for v in g] for g in found]

    def start(settings, *, known=True, moved=False):
        """known: the policy says that its floats have 16 bits. moved: passes round differently."""
        (tmp_path / "even.py").write_text(
            "def even(completion_ids):\n    return [sum(ids) % 2 == 0 for ids in completion_ids]\n"
        )
        given = {"model.path": str(tiny_folder), "run.out": str(tmp_path / f"run-{known}")}
        rewards = {"task.rewards": f"{tmp_path / 'even.py'}:even"}
        with monkeypatch.context() as patch:
            patch.setattr(DecodeLog, "write", noisy)
            patch.setattr(Policy, "sixteen_bit", property(lambda self: known))
            if moved:
                patch.setattr(components, "group_logprobs", rounding)
            folder = train(RunConfig.create(settings | given | rewards)).folder
        return [list(read_jsonl(folder / f"{name}.jsonl")) for name in ("metrics", "rollouts")]

    return start


def cut(groups):
    """Number of reused completions of which a part was rejected."""
    return sum(n["parent"] >= 0 for group in groups for n in group["nodes"])


def test_an_unchanged_policy_accepts_what_it_wrote(run):
    lines, groups = run(REUSE)
    assert [line["rollout/reused_tokens"] > 0 for line in lines] == [False, True, True]
    assert cut(groups) == 0
    for line in lines:
        assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(0.04, rel=0.2)
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
        assert line["update/drift"] == 0
    # It would not, compared with the sampler's record.
    assert cut(run(REUSE, known=False)[1]) > 0


def test_where_every_pass_rounds_in_its_own_way_little_is_rejected(run):
    """A policy that has moved by less than can be seen through rounding."""
    rejected = [cut(run(REUSE, known=known, moved=True)[1]) for known in (True, False)]
    assert rejected[0] < rejected[1] / 2


def test_an_unchanged_policy_is_not_too_far_from_itself(run):
    assert sum(line["replay/groups"] for line in run(REPLAY)[0]) > 0
    assert sum(line["replay/groups"] for line in run(REPLAY, known=False)[0]) == 0


def test_scoring_is_paid_for_only_where_groups_come_back(run, monkeypatch):
    calls, score = [], Sampler._scored_for_later

    def counting(self, fresh):
        found = score(self, fresh)
        calls.append(any(n.scored_logprobs is not None for s in found for n in s.group.nodes))
        return found

    monkeypatch.setattr(Sampler, "_scored_for_later", counting)
    run(STILL)
    run(REUSE, known=False)
    assert calls == [False] * 6


def test_a_group_that_comes_back_has_the_advantages_that_it_had(tiny_folder, tmp_path):
    """Although the tracker has learned its rewards, and those of later groups, since."""
    (tmp_path / "even.py").write_text(
        "def even(completion_ids):\n    return [sum(ids) % 2 == 0 for ids in completion_ids]\n"
    )
    settings = REPLAY | {
        "model.path": str(tiny_folder),
        "run.out": str(tmp_path / "run"),
        "task.rewards": f"{tmp_path / 'even.py'}:even",
        "rollout.replay_drift": 1.0,
        "rollout.reuse": 0.5,
        "learning.kappa": 4.0,
        "learning.lr": 1e-3,
        "run.steps": 5,
    }
    folder = train(RunConfig.create(settings), progress=False).folder
    seen, back = {}, 0
    for line in read_jsonl(folder / "rollouts.jsonl"):
        text = line["example"], str([node["token_ids"] for node in line["nodes"]])
        advantages = [node["advantage"] for node in line["nodes"]]
        if line["replayed"]:
            assert advantages == pytest.approx(seen[text])
            back += 1
        else:
            seen[text] = advantages
    assert back > 0
