from __future__ import annotations

from pathlib import Path

import pytest
from forests import flat_group, scored

from localrl.runs.metrics import metrics_page, rollout_metrics

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


def test_foreign_tokens_count_as_length_but_not_as_sampled():
    metrics = rollout_metrics([scored(flat_group(2, sampled=[True, False, True]), [1, 0])])
    assert metrics["rollout/tokens"] == 4
    assert metrics["completions/mean_length"] == 3
    assert metrics["entropy"] == 0.5


def test_no_reward_is_null():
    metrics = rollout_metrics([scored(flat_group(2), [None, None])])
    assert metrics["reward"] is None
    assert metrics["reward_std"] is None


def test_the_page_is_made_from_the_table():
    assert (DOCS / "metrics.md").read_text() == metrics_page(), (
        "docs/metrics.md is stale: python -c 'from localrl.runs.metrics import metrics_page as p; "
        'print(p(), end="")\' > docs/metrics.md'
    )
