"""Two ranks, killed and started in more ways than there is time for in every run of the tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import test_ranks
import together
from shared_updates import compare_with_one
from test_ranks import adapter, alone, command, metrics, reward, wait_for_steps
from tiny import make_folder
from waiting import DEADLINE_S

from localrl.runs.checkpoints import Checkpoints

__all__ = ["reward"]


def test_two_ranks_make_the_run_of_one(tiny_folder, tmp_path):
    test_ranks.make_the_run_of_one(tiny_folder, tmp_path, "trees")


@pytest.mark.parametrize(("killed", "again"), [(0, 1), (0, 2), (1, 1)])
def test_a_rank_is_killed_and_the_run_goes_on(tiny_folder, tmp_path, killed, again):
    test_ranks.goes_on(tiny_folder, tmp_path, killed=killed, again=again)


def test_killed_at_random_until_it_is_done(tiny_folder, tmp_path):
    """At any moment, also while it starts or ends; each time both are gone within the limit."""
    random, kills = Random(0), 0
    words = command(tiny_folder, "run", **{"run.steps": 300, "run.eval_every": 100})
    for _ in range(60):
        processes = together.start(tmp_path, 2, words)
        try:
            codes = [process.wait(random.uniform(2.5, 6.0)) for process in processes]
        except subprocess.TimeoutExpired:
            kills += 1
            killed = random.randrange(2)
            processes[killed].send_signal(signal.SIGKILL)
            codes = together.ends(processes)
            assert codes[1 - killed] in (0, 75, 1), together.said(tmp_path, 1 - killed)
        if codes == [0, 0]:
            break
        if (tmp_path / "run" / "run.json").exists():
            words = ["-m", "localrl", "train", "--resume", "--out", "run"]
    else:
        pytest.fail("it never came to an end")
    assert kills
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 301))


def test_twenty_steps_end_within_noise(tiny_folder, tmp_path):
    changes = {"run.steps": 20, "run.eval_every": 0, "learning.lr": 0.005}
    together.run(tmp_path, 2, command(tiny_folder, "two", **changes))
    alone(tmp_path, command(tiny_folder, "one", **changes))
    two, one = adapter(tmp_path / "two"), adapter(tmp_path / "one")
    begun = np.linalg.norm(one)
    assert np.linalg.norm(two - one) < 0.05 * begun
    rewards = [[m["reward"] for m in metrics(tmp_path / out)] for out in ("two", "one")]
    assert abs(np.mean(rewards[0]) - np.mean(rewards[1])) < 0.1


def test_a_stopped_rank_that_says_nothing_ends_all(tiny_folder, tmp_path):
    """Not with the waiting times of a real run: those are the script's own."""
    script = tmp_path / "quick.py"
    script.write_text(
        "import sys\n"
        "from dataclasses import replace\n"
        "from localrl.distributed import collective, liveness as line\n"
        "quick = line.LivenessTimeouts(silence=2.0, grace=2.0)\n"
        "old = collective.meet\n"
        "collective.meet = lambda place, limits=None: old(place, quick)\n"
        "from localrl.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    words = command(tiny_folder, "run", **{"run.steps": 400, "run.eval_every": 0})[2:]
    processes = together.start(tmp_path, 2, [str(script), *words])
    wait_for_steps(tmp_path / "run", 2, processes)
    processes[1].send_signal(signal.SIGSTOP)
    assert together.ends(processes[:1]) == [75]
    together.kill(processes)
    assert "the silence of rank 1 (" in together.said(tmp_path, 0)
    assert Checkpoints(tmp_path / "run" / "checkpoints", pytest.fail).steps()


def test_another_model_is_found_out(tmp_path):
    places = [tmp_path / "here", tmp_path / "there"]
    for width, place in zip((64, 128), places, strict=True):
        place.mkdir()
        make_folder(place / "model", intermediate_size=width)
    processes = together.start(tmp_path, 2, command("model", "run"), places)
    codes = together.ends(processes)
    assert 5 in codes
    assert "The model of this run has changed" in together.said(tmp_path, codes.index(5))
    assert min(codes) > 0


def test_mlx_launch_starts_it(tiny_folder, tmp_path):
    launcher = Path(sys.executable).with_name("mlx.launch")
    words = [str(launcher), "-n", "2", "--backend", "ring"]
    words += ["--starting-port", str(together.free_ports(3) + 1), "--", sys.executable]
    result = subprocess.run(
        [*words, *command(tiny_folder, "run", **{"run.steps": 2})],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "2 steps in" in result.stdout, result.stderr
    assert len(metrics(tmp_path / "run")) == 2


def test_asked_to_stop_both_do(tiny_folder, tmp_path):
    processes = together.start(
        tmp_path, 2, command(tiny_folder, "run", **{"run.steps": 400, "run.eval_every": 0})
    )
    wait_for_steps(tmp_path / "run", 1, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert together.ends(processes) == [75, 75]
    assert "SIGTERM" in together.said(tmp_path, 0)
    assert "--resume --out run" in together.said(tmp_path, 0)
    assert "Rank 1 was stopped by" in together.said(tmp_path, 1)


def test_a_setting_that_cannot_work_ends_both_with_its_message(tiny_folder, tmp_path):
    words = command(tiny_folder, "run", **{"rollout.prompts_per_step": 1})
    processes = together.start(tmp_path, 2, words)
    codes = together.ends(processes)
    assert 2 in codes
    assert min(codes) > 0
    assert "fewer than the 2 ranks" in together.said(tmp_path, codes.index(2))
    assert not (tmp_path / "run").exists()


def test_a_run_without_any_reward_ends_both(tiny_folder, tmp_path):
    (tmp_path / "none.py").write_text(
        "def nothing(completions):\n    return [None] * len(completions)\n"
    )
    changes = {"run.steps": 9, "task.rewards": f"['{tmp_path}/none.py:nothing']"}
    processes = together.start(tmp_path, 2, command(tiny_folder, "run", **changes))
    assert together.ends(processes) == [4, 4]
    for rank in range(2):
        told = together.said(tmp_path, rank)
        assert "No completion of the last 3 steps got a reward: nothing gave None" in told
        assert "no_reward" not in told
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(("size", "prompts"), [(3, 5), (3, 1), (2, 1)])
def test_the_sum_of_shares_is_the_gradient_of_the_whole(tmp_path, size, prompts):
    """Also where ranks have nothing to compute."""
    compare_with_one(tmp_path, size, prompts)
