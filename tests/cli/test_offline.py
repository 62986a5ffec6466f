"""Real models without the network: in the cache, with a network that never answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from waiting import DEADLINE_S

SMALL = (
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.max_completion_tokens=4",
    "task.eval_prompts=2",
)


class BlackHole:
    """Accepts connections, counts them, and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.taken: list[socket.socket] = []
        self.fallen = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self.taken.append(self._socket.accept()[0])
                self.fallen.set()
            except OSError:
                return

    def close(self) -> None:
        self._socket.close()
        for connection in self.taken:
            connection.close()


@contextmanager
def black_hole() -> Iterator[BlackHole]:
    hole = BlackHole()
    try:
        yield hole
    finally:
        hole.close()


@pytest.fixture
def home(tmp_path, tiny_folder) -> Path:
    tiny.make_cached(tiny_folder, tmp_path / "home", "user/tiny")
    return tmp_path / "home"


def environment(home: Path, hole: BlackHole) -> dict[str, str]:
    """All that could lead a client out of this machine leads into the hole."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.endswith("_OFFLINE") and not k.startswith("HF_")
    }
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    clean = {k: v for k, v in clean.items() if k.lower() not in (*proxies, "no_proxy")}
    return {
        **clean,
        "HF_HOME": str(home),
        "HF_ENDPOINT": hole.url,
        **dict.fromkeys([*proxies, *map(str.upper, proxies)], hole.url),
    }


def localrl(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "localrl", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_a_cached_model_is_trained_without_a_single_connection(tmp_path, home):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    train = ["train", "--model", "user/tiny", "--steps", "1", "--out", "run", *settings]
    with black_hole() as hole:
        done = localrl(*train, cwd=tmp_path, env=environment(home, hole))
        assert done.returncode == 0, done.stderr
        assert hole.taken == []
    assert "user/tiny" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapters.safetensors").is_file()


def test_the_hole_is_one(tmp_path, home):
    """What the other tests rest on: the Hub's client would have fallen in, and waited."""
    code = "from huggingface_hub import snapshot_download\nsnapshot_download('user/tiny')"
    command = [sys.executable, "-c", code]
    with black_hole() as hole:
        child = subprocess.Popen(command, cwd=tmp_path, env=environment(home, hole))
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not hole.fallen.wait(0.1) and time.monotonic() < deadline:
                assert child.poll() is None
            assert hole.fallen.is_set()
            assert child.poll() is None
        finally:
            child.kill()
            child.wait()


LOOK = """
import sys
from localrl.cli.main import main
for arguments in (["tasks", "show", "sums", "--model", "user/tiny"],
                  ["doctor", "--model", "user/tiny"], ["train", "--model", "user/other"]):
    try:
        main(arguments)
    except SystemExit as done:
        print("STATUS", done.code)
"""


def test_looking_at_models_makes_no_connection(tmp_path, home):
    with black_hole() as hole:
        command = [sys.executable, "-c", LOOK]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(home, hole), capture_output=True, text=True,
            timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert hole.taken == []
    seen, doctor, other, _ = done.stdout.split("STATUS ")
    assert "<assistant>" in seen
    assert doctor.startswith("0")
    assert "shared tokens are trained once" in doctor
    assert other.startswith("0")
    assert done.stdout.endswith("STATUS 2\n")
    assert "`localrl pull user/other`" in done.stderr
