"""The expected gradient of every strategy beside the exact one of a policy that is enumerated.

`tests/long/test_long_unbiased.py` does the same with many more completions, and more settings.
"""

from __future__ import annotations

import pytest
from enumerated import (
    FRESH,
    REUSE,
    Measured,
    cut_anywhere,
    estimate,
    exact_gradient,
    fresh,
    make_files,
    opened,
    reused,
    stop_of,
    with_learned,
)

from localrl.rollouts import forking, reuse

BLOCKS = 16
PROMPTS = {
    "flat": 30,
    "pairs": 40,
    "tree by entropy": 30,
    "tree by period": 24,
    "adaptive": 30,
    "early ends": 44,
}
"""Prompts of a block: enough for three standard errors below a tenth."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("enumerated"))


@pytest.fixture(autouse=True)
def early_forks(monkeypatch):
    """Completions are short, so paths may fork after their first token."""
    monkeypatch.setattr(forking, "FIRST_TOKENS", 1)


def check(measured: Measured) -> None:
    """Check direction and scale, which must be known well enough to tell 0.9 from 1."""
    assert 3 * measured.scale_se < 0.1
    assert abs(measured.scale - 1) < 3 * measured.scale_se
    assert measured.across < 3 * measured.across_se


def check_noticed(measured: Measured) -> None:
    """Check that a baseline which has learned a completion's own reward would not pass."""
    assert measured.scale < 1 - 3 * measured.scale_se


@pytest.mark.parametrize("name", PROMPTS)
def test_new_groups(name, files, tmp_path):
    settings, prompts = FRESH[name], PROMPTS[name]
    with opened(files, tmp_path / "run", settings) as session:
        exact, _ = exact_gradient(session.policy.model, stop_of(settings))
        found = [(estimate(session, b), b.factor) for b in fresh(session, BLOCKS, prompts)]
    check(Measured.of(found, exact))


def test_reused_completions(files, tmp_path):
    """An unchanged policy accepts them whole."""
    kept, learned = [], []
    with opened(files, tmp_path / "run", REUSE) as session:
        exact, _ = exact_gradient(session.policy.model)
        for block in reused(session, BLOCKS, 80):
            kept.append((estimate(session, block), block.factor))
            learned.append((estimate(session, with_learned(session, block)), block.factor))
    check(Measured.of(kept, exact))
    check_noticed(Measured.of(learned, exact))


def test_reused_prefixes(files, tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "accepted", cut_anywhere)
    with opened(files, tmp_path / "run", REUSE) as session:
        exact, _ = exact_gradient(session.policy.model)
        found = [(estimate(session, b), b.factor) for b in reused(session, BLOCKS, 56)]
    check(Measured.of(found, exact))
