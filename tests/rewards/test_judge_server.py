"""The judge's rewards from a real `mlx_lm.server`, also when it is killed in the middle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bigrams import make_bigrams
from test_judge import closed_port
from waiting import until

from localrl.rewards import chat_client
from localrl.rewards.judge import get_judge_reward

SCORES = [f"Score: {digit}" for digit in range(10)]
ANSWER = "m['content'].split('The answer:')[1].strip()"
TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}<assistant>{{ " + ANSWER + "[0] }}{% endfor %}"
)
"""The first character of the answer is the last that the model reads: it is the score."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """A model that gives an answer as many points as its first digit says."""
    folder = tmp_path_factory.mktemp("models") / "judge"
    follows = {score[-1]: score for score in SCORES}
    return make_bigrams(folder, follows, template=TEMPLATE, extra=SCORES)


class MlxLmServer:
    """`mlx_lm.server` as a process that can be killed."""

    def __init__(self, model: Path) -> None:
        self.port = closed_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.answered = 0
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlx_lm", "server"),
                *("--model", str(model), "--port", str(self.port)),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        threading.Thread(target=self._count, args=(self.process.stderr,), daemon=True).start()
        until(self._listens, "mlx_lm.server")

    def _count(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.answered += "POST /v1/chat/completions" in line

    def _listens(self) -> bool:
        assert self.process.poll() is None
        with socket.socket() as place:
            return place.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def texts(first: int) -> list[str]:
    return [f"{i % 10} points for answer {i}" for i in range(first, first + 64)]


def test_a_server_killed_in_the_middle_costs_the_rest_of_the_step(judge, monkeypatch):
    monkeypatch.setattr(chat_client, "PAUSES_S", (0.0, 0.0))
    server = MlxLmServer(judge)
    try:
        # Its list of models fails where nothing was ever fetched from the Hub, so its one is named.
        reward = get_judge_reward(url=server.url, model="default_model", parallel=2)
        values = reward(prompts=["p"] * 64, completions=texts(0))
        assert values == [(i % 10) / 10 for i in range(64)]

        def kill_in_the_middle() -> None:
            until(lambda: server.answered >= 64 + 8, "some answers")
            server.kill()

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        values = reward(prompts=["p"] * 64, completions=texts(100))
        killer.join()
    finally:
        server.kill()
    right = [(i % 10) / 10 for i in range(100, 164)]
    failed = [value for value in values if isinstance(value, str)]
    assert 0 < len(failed) < 64
    assert all(isinstance(v, str) or v == r for v, r in zip(values, right, strict=True))
    assert all(text.startswith("the judge gave no answer: ") for text in failed)
    assert sum("not asked" in text for text in failed) >= len(failed) - 4
