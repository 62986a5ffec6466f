from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forests import flat_group, forest, scored

from localrl.runs.metrics import METRICS, metrics_page, rollout_metrics, selection_metrics

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_worked_by_hand():
    groups = [scored(flat_group(2), [1, 0]), scored(flat_group(3), [1, 1, None])]
    metrics = rollout_metrics(groups)
    assert metrics["reward"] == pytest.approx(3 / 4)
    assert metrics["reward_std"] == pytest.approx(0.5)
    assert metrics["rewards/hand/mean"] == pytest.approx(3 / 4)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["entropy"] == 0.5
    assert metrics["rollout/tokens"] == 15
    assert metrics["completions/mean_length"] == 3
    assert metrics["completions/clipped_ratio"] == 0


def test_foreign_tokens_count_nowhere():
    metrics = rollout_metrics([scored(flat_group(2, sampled=[True, False, True]), [1, 0])])
    assert metrics["rollout/tokens"] == 4
    assert metrics["completions/mean_length"] == 2
    assert metrics["entropy"] == 0.5


def test_no_reward_is_null():
    metrics = rollout_metrics([scored(flat_group(2), [None, None])])
    assert metrics["reward"] is None
    assert metrics["reward_std"] is None


def rounds(group, *numbers):
    nodes = [replace(n, round=number) for n, number in zip(group.nodes, numbers, strict=True)]
    return replace(group, nodes=tuple(nodes))


def stale(group, *which):
    """The group, with these nodes written by an earlier policy."""
    nodes = [
        replace(n, old_logprobs=np.zeros(len(n.token_ids))) if i in which else n
        for i, n in enumerate(group.nodes)
    ]
    return replace(group, nodes=tuple(nodes))


def test_rounds_are_counted_where_most_came():
    groups = [rounds(flat_group(3), 0, 0, 1), rounds(flat_group(2), 0, 0)]
    metrics = rollout_metrics([scored(g, [1.0] * len(g.leaves)) for g in groups])
    assert metrics["rollout/rounds"] == 2
    assert metrics["rollout/completions"] == 5
    assert rollout_metrics([scored(groups[1], [1, 0])])["rollout/rounds"] == 1


def test_forks_and_the_tokens_they_save():
    # Two roots; the first forks, and one of its children again. Nodes have 3 tokens each.
    tree = forest([-1, -1, 0, 0, 2, 2], [1, 3, 4, 5], planned_roots=2)
    metrics = rollout_metrics([scored(tree, [1, 0, 0, 0])])
    assert metrics["rollout/tokens"] == 18
    assert metrics["completions/mean_length"] == (3 + 6 + 9 + 9) / 4
    assert metrics["tree/saved_tokens"] == 27 - 18
    assert metrics["tree/forks_per_path"] == (0 + 1 + 2 + 2) / 4


def test_reused_tokens_were_not_sampled_now():
    # A fresh completion, one with a fresh tail behind a reused prefix, and one reused whole.
    group = stale(forest([-1, -1, 1, -1], [0, 2, 3], planned_roots=3), 1, 3)
    metrics = rollout_metrics([scored(group, [1, 0, 0])])
    assert metrics["rollout/tokens"] == 6
    assert metrics["rollout/reused_tokens"] == 6
    assert metrics["rollout/completions"] == 3
    assert metrics["tree/forks_per_path"] == 0 == metrics["tree/saved_tokens"]


def test_cut_off_are_those_at_the_limit_alone():
    group = flat_group(4)
    reasons = ("length", "loop", "closed", "stop")
    leaves = [replace(leaf, finish_reason=r) for leaf, r in zip(group.leaves, reasons, strict=True)]
    metrics = rollout_metrics([scored(replace(group, leaves=tuple(leaves)), [0] * 4)])
    assert metrics["completions/clipped_ratio"] == 0.25


def test_every_completion_and_every_token_is_accounted_for():
    groups = [
        scored(flat_group(3), [1, 0, None]),
        scored(flat_group(2), [1, 1]),
        scored(stale(flat_group(2, sampled=[True, False, True]), 0, 1), [1, 0]),
    ]
    dropped = [
        (None, "truncated", "no reward"),
        ("no coefficient", "no coefficient"),
        (None, None),
    ]
    metrics = selection_metrics(groups, dropped, trained_tokens=3 + 4)
    assert metrics == {
        "selection/trained": 3,
        "selection/no_reward": 1,
        "selection/no_coefficient": 2,
        "selection/truncated": 1,
        "update/skipped_tokens": 15 + 4 - 7,
    }
    assert set(metrics) <= set(METRICS)


def test_the_page_is_made_from_the_table():
    assert (DOCS / "metrics.md").read_text() == metrics_page(), (
        "docs/metrics.md is stale: python -c 'from localrl.runs.metrics import metrics_page as p; "
        'print(p(), end="")\' > docs/metrics.md'
    )
