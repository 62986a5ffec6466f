"""kill -9 at any moment: what is there can be loaded, and the end is the same."""

from __future__ import annotations

import pytest
from killed import Killer
from test_resuming import SMALL, outcome

from localrl.runs.checkpoints import Checkpoints, damage

SETTINGS = {
    **SMALL,
    "run.steps": 6,
    "run.eval_every": 0,
    "run.checkpoint_every": 1,
    "rollout.reuse": 0.5,
}


@pytest.fixture(scope="module")
def killer(tiny_folder, engine):
    settings = {**SETTINGS, "model.path": str(tiny_folder), "model.engine": engine}
    killer = Killer(settings, seed=0)
    yield killer
    killer.close()


@pytest.mark.exact
def test_killed_many_times_it_ends_the_same(killer, tmp_path):
    killer.whole(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    runs = 0
    while killer.kills < 4:
        out = tmp_path / f"run-{runs}"
        killer.run(out, kills=4)
        assert outcome(out) == expected
        store = Checkpoints(out / "checkpoints", pytest.fail)
        assert store.steps()
        assert all(damage(store.folder / f"step-{step:06d}") is None for step in store.steps())
        runs += 1
