"""Every command in README, docs and --help that can run offline runs, on tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import pytest
import within
from documented import ROOT, Command, block_lines, documented, parse
from waiting import DEADLINE_S

from localrl.cli.main import main
from localrl.embedded import embedded_model_path
from localrl.gguf.convert import as_folder

sys.path.append(str(Path(__file__).parent / "gguf"))
from written import TEMPLATE, write_model

NETWORK = "needs the network; tests/export has a Hub of its own"
REAL = "measures whole steps of a real model's size: minutes on a CPU"
RECIPE = "needs GSM8K and hours; tests/diagnostics/test_recipes.py runs it on a tiny model"
JUDGE = "needs Ollama or LM Studio; tests/rewards has judges of its own"
EXTRA = "needs packages that the tests do not install"
NOT_RUN = {
    "localrl pull smollm2-135m": NETWORK,
    "localrl pull mlx-community/Qwen3-0.6B-4bit": NETWORK,
    "localrl pull mlx-community/Qwen3.5-0.8B-4bit": NETWORK,
    "localrl pull Qwen/Qwen2.5-1.5B-Instruct": NETWORK,
    "localrl pull --data user/problems:train.jsonl --out problems.jsonl": NETWORK,
    "localrl pull --data openai/gsm8k:main": NETWORK,
    "localrl push runs/problems-1 you/my-skill": NETWORK,
    "localrl push runs/steps-1 you/steps": NETWORK,
    "localrl push runs/extraction-1-3-1 you/facts": NETWORK,
    "localrl train --task problems.jsonl --reward judge --set task.judge_model=qwen3:8b": JUDGE,
    "localrl bench --shape qwen3-0.6b": REAL,
    "localrl bench --shape qwen3.5-0.8b": REAL,
    "localrl bench --recipe gsm8k-cppo": RECIPE,
    "localrl bench --recipe gsm8k-cppo --problems 400 --set task.eval_prompts=200"
    " --out runs/gsm8k-small": RECIPE,
    "localrl train --set run.report_to=tensorboard": EXTRA,
    'localrl train --set run.report_to=["tensorboard", "wandb"]': EXTRA,
}
"""Commands that are shown and not run here, with the reason."""

COMING: set[str] = set()
"""Commands whose options are still to come: one that works must leave this list."""

TRAIN = (
    *("--steps", "1", "--no-supervise", "--set", "task.eval_prompts=2"),
    *("--set", "rollout.prompts_per_step=2", "--set", "rollout.max_completion_tokens=8"),
)
SHORT = {
    "bench": ("--rows", "1,2", "--tokens", "4", "--prompt-tokens", "4", "--repeats", "1"),
    "chat": ("--max-tokens", "8"),
    "eval": ("--prompts", "2", "--set", "rollout.max_completion_tokens=8"),
    "train": TRAIN,
    "sft": ("--steps", "1", "--no-supervise", "--set", "task.eval_prompts=2"),
}
"""Options added to a command so that it ends soon."""
MODELS = ("DIR", "path/to/model", "started", "smollm2-135m", "mlx-community/Qwen3-0.6B-4bit")
"""Models of the pages; a folder of that name takes precedence over the Hub's cache."""
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
THINKING = TEMPLATE + "{% if enable_thinking is defined %}{% endif %}"
SCORE = "def {}(completions, **columns):\n    return [1.0 for _ in completions]\n"
SEARCH = """
def search(text: str) -> str:
    \"""Search.

    Args:
        text: What for.
    \"""
    return text
"""
AGENT = """
def run(example, base_url, api_key):
    return float(len(ask(base_url, api_key, example["prompt"])["content"] or "") % 2)
"""
FILES = {
    "my_agent.py": (ROOT / "examples" / "agent" / "guess.py").read_text() + AGENT,
    "my.toml": '[task]\nname = "steps"\n',
    "my_rewards.py": SCORE.format("score"),
    "rewards.py": SCORE.format("found_it"),
    "tools.py": SEARCH,
}
WRITTEN = {"runs", "RUN", "ADAPTER"}
"""What commands may write into: each gets a copy."""
COMMANDS = documented()
RUN = [
    pytest.param(command, marks=[pytest.mark.xfail(strict=True)] * (str(command) in COMING))
    for command in COMMANDS
    if str(command) not in NOT_RUN
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with everything that the pages name: models, data, functions and runs."""
    folder = tmp_path_factory.mktemp("world")
    file = write_model(folder / "file.gguf", kind="Q4_1", config=SIZES, template=THINKING).path
    model = as_folder(file, lambda _: None)
    for name in MODELS:
        shutil.copytree(model, folder / name)
    rows = [{"prompt": f"sum {i} 7", "answer": str(i + 7), "number": i} for i in range(40)]
    worked = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
    page = (ROOT / "docs" / "environments.md").read_text()
    game = page.partition("```python\n")[2].partition("```")[0]  # the page's own example
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data").mkdir()
    data = dict.fromkeys(
        ("problems.jsonl", "data.jsonl", "rows.jsonl", "test.jsonl", "data/train.jsonl"), lines
    )
    more = {"worked.jsonl": "".join(json.dumps(row) + "\n" for row in worked), "game.py": game}
    for name, text in {**FILES, **data, **more}.items():
        (folder / name).write_text(text)
    (folder / "examples").symlink_to(ROOT / "examples")
    make_runs(folder)
    return folder


def run(*words: str, folder: Path) -> None:
    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0


def make_runs(folder: Path) -> None:
    """Make the runs that the pages mention, and adapters out of them."""
    problems = ("--task", "problems.jsonl", "--reward", "accuracy", "--model", "path/to/model")
    base = ("--set", "model.base_id=user/base")
    for words in (("--out", "runs/steps-1"), ("--out", "runs/problems-1", *problems, *base)):
        run("train", *words, *TRAIN, folder=folder)
    for name in ("runs/try", "runs/mac-killed", "RUN"):
        shutil.copytree(folder / "runs" / "steps-1", folder / name)
    for name in ("extraction-1-3-1", "sft-worked-1", "started"):
        shutil.copytree(folder / "runs" / "problems-1", folder / "runs" / name)
    adapter = folder / "runs" / "problems-1" / "adapter"
    shutil.copytree(adapter, folder / "ADAPTER")
    for name in ("adapter_config.json", "adapters.safetensors"):
        shutil.copy(adapter / name, folder / "DIR" / name)


def place(command: Command, world: Path, folder: Path) -> None:
    """Lay out what the command names, and runs for one that takes the newest."""
    words = command.words
    named = {*re.split(r"[\s:/]", str(command)), "smollm2-135m"}
    if words[1] == "show" or "--resume" in words:
        named.add("runs")
    if "runs" in named:
        named |= {"path", "problems.jsonl"}  # of runs/problems-1
    if "train.toml" in words or words[1] == "init":
        named = set()
    if "train.toml" in words:  # what `init` has written before
        run("init", ".", folder=folder)
    for found in world.iterdir():
        if found.name in named & WRITTEN:
            shutil.copytree(found, folder / found.name)
        elif found.name in named:
            (folder / found.name).symlink_to(found)
    prefer(words, folder)
    if words[1] in ("train", "sft") and "--out" in words and "--resume" not in words:
        shutil.rmtree(folder / words[words.index("--out") + 1], ignore_errors=True)


def prefer(words: tuple[str, ...], folder: Path) -> None:
    """Let the first completion of each group be right where a command takes a run's rollouts."""
    place = {"--pairs": 2, "--from-rollouts": 3}
    named = [words[at] for option, at in place.items() if option in words]
    if not named:
        return
    rollouts = folder / named[0] / "rollouts.jsonl"
    groups = [json.loads(line) for line in rollouts.read_text().splitlines()]
    for group in groups:
        right = {"reward": 1.0, "parts": {"right": 1.0}, "text": "right", "finish_reason": "stop"}
        group["leaves"][0] |= right
    rollouts.write_text("".join(json.dumps(group) + "\n" for group in groups))


def shortened(command: Command) -> tuple[str, ...]:
    words = command.words[1:]
    added = SHORT.get(words[0], ())
    if "--resume" in words:
        added = ("--steps", "2", "--no-supervise")
    elif "--tool" in words:  # the model that ships with localrl and calls tools
        added = (*added, "--model", str(embedded_model_path("turns-0.1m")))
    return (*words, *added)


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_runs_as_shown(command, world, tmp_path, monkeypatch, capfd):
    place(command, world, tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(command.stdin + "\n"))
    if command.words[0] == "python":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", list(command.words[1:]))
        runpy.run_path(str(ROOT / command.words[1]), run_name="__main__")
        return
    if "--live" in command.words:
        serves(command, tmp_path)
        return
    if command.words[1] == "serve":
        answers(command, tmp_path, capfd)
        return
    done = within.localrl(capfd, *shortened(command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def serves(command: Command, folder: Path) -> None:
    """Hold a command that serves a page to doing so until Ctrl-C."""
    words = (sys.executable, "-um", *command.words)
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[0]
            with urllib.request.urlopen(url, timeout=30) as page:
                assert b"<title>" in page.read()
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            server.kill()


def answers(command: Command, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Hold a command that serves a model to doing so until Ctrl-C, in this process."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1/models"
    found: list[bytes] = []

    def ask() -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not found and time.monotonic() < deadline:
            with contextlib.suppress(OSError, HTTPException):
                found.append(urllib.request.urlopen(url, timeout=DEADLINE_S).read())
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    # Processes that a script started in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    client = threading.Thread(target=ask)
    client.start()
    done = within.localrl(capfd, *command.words[1:], "--port", port, cwd=folder)
    client.join()
    signal.signal(signal.SIGINT, before)
    assert done.returncode == 0, done.stderr
    assert json.loads(found[0])["data"]


def test_a_command_that_is_not_run_is_still_shown():
    assert set(NOT_RUN) | COMING <= {str(command) for command in COMMANDS}


def test_commands_are_found_in_all_three_places_and_read_as_a_shell_would():
    places = " ".join(COMMANDS.values())
    assert all(place in places for place in ("README.md", "docs/export.md", "localrl bench --help"))
    assert list(parse('echo "a b" | localrl chat X > f && time localrl show  remark')) == [
        Command(("localrl", "chat", "X"), "a b"),
        Command(("localrl", "show")),
    ]
    assert list(block_lines("    a \\\n      b\n```\nc\n```\n```python\nd\n```\ne")) == ["a b", "c"]
