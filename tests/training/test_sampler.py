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
KAPPA = 4.0


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


def test_a_completion_that_comes_back_is_compared_with_what_was_expected_of_it(run):
    """Although the tracker has learned its reward, and those of later groups, since."""
    settings = REUSE | {"learning.kappa": KAPPA, "learning.lr": 1e-3, "run.steps": 5}
    expected, back = {}, []
    for line in run(settings)[1]:
        for version, stale, value in expectations(line):
            if not stale:
                expected[line["example"], version] = value
            elif version:  # nothing was expected in the first step
                back.append((value, expected[line["example"], version]))
    found, wanted = zip(*back, strict=True)
    assert found == pytest.approx(wanted, abs=1e-3)
    assert max(expected.values()) > min(expected.values()) + 0.05


def expectations(line):
    """For each root its version, whether it came back, and the reward expected of its prompt."""
    nodes = line["nodes"]
    roots = {i: i for i, node in enumerate(nodes) if node["parent"] < 0}
    for i, node in enumerate(nodes):
        roots.setdefault(i, node["parent"])
    rewards = {roots[leaf["node"]]: leaf["reward"] for leaf in line["leaves"]}
    total, others = sum(rewards.values()), len(rewards) - 1
    for root, reward in rewards.items():
        # The baseline is (the others' rewards + kappa * expected) / (others + kappa).
        baseline = reward - nodes[root]["advantage"]
        found = (baseline * (others + KAPPA) - (total - reward)) / KAPPA
        yield nodes[root].get("version", 0), "old_logprobs" in nodes[root], found
