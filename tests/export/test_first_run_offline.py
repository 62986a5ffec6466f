"""Nothing but `pull` and `push` opens a connection."""

from __future__ import annotations

import os
import subprocess
import sys

from waiting import DEADLINE_S

TRAIN = """
import os, socket

def tried(*arguments):
    os.write(2, b"a connection was tried")
    os._exit(99)  # an exception could be caught

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = tried
from localrl.cli.main import main

main(["train", "--no-supervise", "--steps", "1", "--out", "run", "--set", "task.eval_prompts=2",
      "--set", "rollout.prompts_per_step=2", "--set", "rollout.max_completion_tokens=4"])
"""


def test_first_run_offline(tmp_path):
    """No model, no task, nothing said about being offline, an empty cache: it trains."""
    env = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        env={**env, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapters.safetensors").is_file()
