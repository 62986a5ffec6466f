"""Long tests of runs that are interrupted: `.ci/long` runs them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from killed import Killer
from test_resuming import SMALL, config, outcome

from localrl.errors import CheckpointError, ConfigError
from localrl.runs.checkpoints import Checkpoints, damage
from localrl.runs.logs import read_jsonl
from localrl.train import train

SETTINGS = {
    **SMALL,
    "run.steps": 10,
    "run.checkpoint_every": 1,
    "rollout.strategy": "tree",
    "rollout.fork_rule": "entropy",
    "rollout.reuse": 0.5,
}


@pytest.mark.parametrize(
    ("number", "kills"), [(signal.SIGKILL, 200), (signal.SIGTERM, 40), (signal.SIGINT, 40)]
)
@pytest.mark.parametrize("seed", [1])
def test_runs_end_the_same_however_often_they_are_ended(tiny_folder, tmp_path, number, kills, seed):
    killer = Killer({**SETTINGS, "model.path": str(tiny_folder)}, seed=seed)
    try:
        killer.whole(tmp_path / "whole")
        expected, runs = outcome(tmp_path / "whole"), 0
        while killer.kills < kills:
            out = tmp_path / f"run-{runs}"
            killer.run(out, kills=10, number=number)
            assert outcome(out) == expected
            store = Checkpoints(out / "checkpoints", pytest.fail)
            assert all(damage(store.folder / f"step-{step:06d}") is None for step in store.steps())
            runs += 1
        print(f"{killer.kills} ends by {number.name} in {runs} runs")
    finally:
        killer.close()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_written(tiny_folder, tmp_path, small_disk: Path):
    """The disk fills during the run; with room again the run goes on to the same end."""
    settings = config(tiny_folder, tmp_path / "whole", **SETTINGS)
    train(settings)
    out = small_disk / "run"
    with pytest.raises((CheckpointError, ConfigError, OSError)):
        train(settings.replace("run.out", str(out)))
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl")]
    assert steps == sorted(steps)
    store = Checkpoints(out / "checkpoints", pytest.fail)
    assert all(damage(store.folder / f"step-{step:06d}") is None for step in store.steps())
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    train(settings.replace("run.out", str(out)), resume=True)
    assert outcome(out) == outcome(tmp_path / "whole")
