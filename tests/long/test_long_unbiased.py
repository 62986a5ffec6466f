"""Long measurements of every strategy's gradient beside the exact one; `.ci/long` runs them."""

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
)

from localrl.rollouts import forking, reuse

BLOCKS, PROMPTS = 200, 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("enumerated"))


def check(name: str, measured: Measured) -> None:
    print(
        f"{name}: scale {measured.scale:.4f} ± {measured.scale_se:.4f}, squared bias across "
        f"{measured.across:.5f} ± {measured.across_se:.5f}"
    )
    assert 3 * measured.scale_se < 0.025
    assert abs(measured.scale - 1) < 3 * measured.scale_se
    assert measured.across < 3 * measured.across_se


@pytest.mark.parametrize("name", FRESH)
def test_new_groups(name, files, tmp_path, monkeypatch):
    monkeypatch.setattr(forking, "FIRST_TOKENS", 1)
    settings = FRESH[name]
    with opened(files, tmp_path / "run", settings) as session:
        exact, _ = exact_gradient(session.policy.model, stop_of(settings))
        found = [(estimate(session, b), b.factor) for b in fresh(session, BLOCKS, PROMPTS)]
    check(name, Measured.of(found, exact))


@pytest.mark.parametrize("cut", [False, True])
def test_reused_completions(cut, files, tmp_path, monkeypatch):
    if cut:
        monkeypatch.setattr(reuse, "accepted", cut_anywhere)
    with opened(files, tmp_path / "run", REUSE) as session:
        exact, _ = exact_gradient(session.policy.model)
        blocks = reused(session, 2 * BLOCKS, PROMPTS)
        found = [(estimate(session, block), block.factor) for block in blocks]
    check("reused prefixes" if cut else "reused completions", Measured.of(found, exact))
