"""The command as a user meets it: exit codes, both output streams, for the most real processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import within
from waiting import DEADLINE_S

SMALL = (
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.max_completion_tokens=6",
    "task.eval_prompts=4",
)


def localrl(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "localrl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100"},
    )


def settings():
    return [part for setting in SMALL for part in ("--set", setting)]


def test_a_run_without_a_terminal_prints_plain_lines(tiny_folder, tmp_path):
    out = tmp_path / "a run"
    done = localrl("train", "--model", tiny_folder, "--steps", 2, "--out", out, *settings())
    assert done.returncode == 0, done.stderr
    assert "before training: pass@1" in done.stderr
    assert "step 2/2" in done.stderr
    assert "pass@1" in done.stdout
    assert done.stdout.count("prompt    ") == 3
    assert "next: localrl" in done.stdout
    assert not {"\r", "\x1b"} & set(done.stdout + done.stderr)
    assert (out / "adapter" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("flat", "x 4 completions of"),
        ("tree", "x trees with up to 4 completions of"),
        ("adaptive", "x 2 to 4 completions of"),
    ],
)
def test_every_strategy_trains(tiny_folder, tmp_path, capfd, strategy, told):
    out = tmp_path / "run"
    sizes = ("--set", "rollout.group_size=4")
    run = ("--model", tiny_folder, "--rollouts", strategy, "--steps", 3, "--out", out)
    words = ("train", *run, *settings(), *sizes, "--no-supervise")
    done = within.localrl(capfd, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    assert "step 3/3" in done.stderr
    resolved = tomllib.loads((out / "config.toml").read_text())
    assert resolved["rollout"]["strategy"] == strategy


def test_a_run_has_a_folder_of_its_own(tiny_folder, tmp_path, capfd):
    arguments = ("train", "--model", tiny_folder, "--steps", 1, *settings())

    def train(*more):
        return within.localrl(capfd, *arguments, "--no-supervise", *more, cwd=tmp_path)

    for _ in range(2):  # nothing is named: a new one each time
        done = train()
        assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs"
    assert {path.name for path in runs.iterdir()} == {"steps-1", "steps-2"}
    refused = train("--out", runs / "steps-1")
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert localrl(*arguments, "--out", runs / "steps-1", "--overwrite").returncode == 0
    old = [path for path in runs.iterdir() if path.name.startswith("steps-1.old-")]
    assert len(old) == 1
    assert (old[0] / "adapter" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--set", "rollout.groupsize=4"], 2, "Did you mean 'rollout.group_size'"),
        (["train", "--set", "rollout.group_size=-1"], 2, "must be at least 0"),
        (["train", "--rollouts", "rounds"], 2, "must be flat, tree or adaptive"),
        (["train", "--set", "rollout.replay_groups=2"], 2, "2, but this setting was removed"),
        (
            ["train", "--set", "rollout.group_size=1", "--set", "learning.kappa=0"],
            2,
            "learning.kappa is 0 and rollout.group_size is 1",
        ),
        (["train", "--set", "group_size"], 2, "has no '='"),
        (["train", "--steps", "many"], 2, "not a valid integer"),
        (["train", "--model", "nowhere"], 2, "no model in nowhere"),
        (["train", "--task", "sumz"], 2, "did you mean 'sums'"),
        (["train", "--resume", "--out", "none"], 2, "There is no run in none"),
        (["train", "--memory-limit", "lots"], 2, "memory.limit is 'lots'"),
        (["train", "--memory-limit", "1MB"], 3, "The smallest sufficient limit is --memory-limit"),
        (["train", "none.toml"], 2, "Cannot read the configuration none.toml"),
        (["tasks", "show", "sumz"], 2, "did you mean 'sums'"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, capfd, arguments, code, message):
    done = within.localrl(capfd, *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path):
    done = localrl("--debug", "train", "--model", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_print_config_is_a_file_that_reads_back(tmp_path):
    done = localrl("train", "--set", "rollout.group_size=6", "--seed", 3, "--print-config")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["rollout"]["group_size"] == 6
    file = tmp_path / "run.toml"
    file.write_text(done.stdout)
    again = localrl("train", file, "--print-config")
    assert again.stdout == done.stdout


def test_a_setting_given_twice_is_told(tmp_path, capfd):
    words = ("rollout.stop_text=a", "run.seed=1", " rollout.stop_text = b", "run.steps=2")
    given = [part for word in words for part in ("--set", word)]
    done = within.localrl(capfd, "train", *given, "--print-config", cwd=tmp_path)
    assert tomllib.loads(done.stdout)["rollout"]["stop_text"] == ["b"]
    assert done.stderr == (
        "warning: --set gives rollout.stop_text more than once; rollout.stop_text = b counts\n"
    )


def test_flags_win_over_set_and_set_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[run]\nsteps = 1\nseed = 1\n[rollout]\ngroup_size = 3\n")
    done = localrl(
        "train", file, "--set", "run.steps=2", "--set", "run.seed=2", "--seed", 3, "--print-config",
        "--memory-limit", "70%",
    )  # fmt: skip
    resolved = tomllib.loads(done.stdout)
    assert resolved["memory"]["limit"] == "70%"
    assert resolved["run"]["steps"] == 2
    assert resolved["run"]["seed"] == 3
    assert resolved["rollout"]["group_size"] == 3


def test_tasks_show_what_the_model_sees(tiny_folder):
    listed = localrl("tasks", "list")
    assert "sums" in listed.stdout
    shown = localrl("tasks", "show", "sums", "-n", 2, "--model", tiny_folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("<user>sum ") == 2
    assert "answer" in shown.stdout


def test_help_is_quick():
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "train" in localrl("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what the command takes on an idle machine, also when this one is not.
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5


def test_control_characters_do_not_reach_the_terminal():
    from localrl.utils.text import printable

    assert printable("a\x1b[31mb\u202ec\n\x07") == "a\ufffd[31mb\ufffdc\n\ufffd"


def test_the_installed_command_is_there():
    assert Path(sys.executable).with_name("localrl").exists()


PRESSING = """
import os, signal
def score(completions, trainer_state=None, **columns):
    if trainer_state is not None and trainer_state.global_step == 1:
        if not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            os.kill(os.getppid(), signal.SIGINT)
    return [float(len(text)) for text in completions]
"""


def test_ctrl_c_is_no_error(tiny_folder, tmp_path):
    rewards, out = tmp_path / "rewards.py", tmp_path / "run"
    rewards.write_text(PRESSING.format(marker=str(tmp_path / "pressed")))
    reward = ("--reward", f"{rewards}:score", "--task", "sorting")
    run = ("--model", tiny_folder, "--steps", 3, "--out", out, "--no-supervise")
    done = localrl("train", *run, *reward, *settings())
    assert done.returncode == 75, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Stopped by Ctrl-C, and saved after step ")
    assert last.endswith(f". Resume with: localrl train --resume --out {out}")
    assert "Error" not in done.stderr
    assert localrl("train", "--resume", "--out", out, "--no-supervise").returncode == 0


OPENING = """
import os, signal
os.kill(os.getppid(), signal.SIGINT)
def score(completions, **columns):
    return [0.0 for text in completions]
"""


def test_ctrl_c_before_the_run_is_open(tiny_folder, tmp_path):
    rewards, out = tmp_path / "rewards.py", tmp_path / "run"
    rewards.write_text(OPENING)
    reward = ("--reward", f"{rewards}:score", "--task", "sorting")
    done = localrl(
        "train", "--model", tiny_folder, "--out", out, "--no-supervise", *reward, *settings()
    )
    assert done.returncode == 75, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Stopped by Ctrl-C while the run was being opened.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell):
    code = "from localrl.cli.main import main; main([])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "_LOCALRL_COMPLETE": f"{shell}_source"},
    )
    assert done.returncode == 0, done.stderr
    assert "_LOCALRL_COMPLETE" in done.stdout
    assert "localrl" in done.stdout.splitlines()[0]
