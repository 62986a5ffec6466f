"""`localrl push` through the real client to a Hub of our own: what arrives, and what never does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, attach, environment, terminal
from waiting import DEADLINE_S

from localrl import RunConfig, train
from localrl.cli.main import main
from localrl.export import hub as client
from localrl.export import push as pushing

TOKEN = "hf_" + "ThisIsNoRealToken" * 2
SECRET = "zebra 4711 waits"
"""In the data, the reward, an answer, a completion, and names of files."""

TWICE = """
import sys
from localrl.cli.main import main
for _ in range(2):
    try:
        main(sys.argv[1:])
    except SystemExit as done:
        assert not done.code
    print("--")
"""

NAMES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "localrl.json",
}


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory) -> Path:
    """A real run on data and a reward of one's own, with a sentence planted wherever one can be."""
    place = tmp_path_factory.mktemp("runs") / SECRET
    place.mkdir()
    rows = [{"prompt": f"say {i} {SECRET}", "answer": f"{i} {SECRET}"} for i in range(12)]
    (place / f"{SECRET}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward = place / "rewards.py"
    reward.write_text(
        f'"""{SECRET}"""\ndef score(completions, log_extra, **columns):\n'
        f"    log_extra({SECRET!r}, [{SECRET!r}] * len(completions))\n"
        "    return [float(i % 2) for i, _ in enumerate(completions)]\n"
    )
    settings = {
        "model.path": str(tiny_folder),
        "model.base_id": "acme/tiny",
        "task.name": str(place / f"{SECRET}.jsonl"),
        "task.rewards": (f"{reward}:score",),
        "task.system": SECRET,
        "task.eval_prompts": 2,
        "rollout.prompts_per_step": 2,
        "rollout.max_completion_tokens": 6,
        "rollout.stop_text": SECRET,
        "lora.rank": 4,
        "run.steps": 2,
        "run.out": str(place / "run"),
    }
    folder = train(RunConfig.create(settings)).folder
    (folder / "notes.txt").write_text(SECRET)
    (folder / "adapter" / "notes.txt").write_text(SECRET)
    rollouts = folder / "rollouts.jsonl"
    lines = [json.loads(line) for line in rollouts.read_text().splitlines()]
    for line in lines:
        line["leaves"][0]["text"] = f"{SECRET}\n```\n# not a heading"
    rollouts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert SECRET in (folder / "config.toml").read_text()
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "WAITS_S", (0.0, 0.0))
    with FakeHub(token=TOKEN) as hub:
        attach(hub, tmp_path / "home", monkeypatch)
        yield hub


@pytest.fixture
def push(monkeypatch, capsys, run):
    """The command in this process: its exit code and what it printed."""

    def call(*arguments: str, folder: Path = run) -> tuple[int, str]:
        words = ["push", str(folder), *arguments]
        monkeypatch.setattr(sys, "argv", ["localrl", *words])
        with pytest.raises(SystemExit) as done:
            main(words)
        printed = capsys.readouterr()
        return int(done.value.code or 0), printed.out + printed.err

    return call


@pytest.mark.parametrize("xet", [True, False])
def test_a_push_is_private_and_carries_nothing_of_its_owner(run, tmp_path, xet):
    home = tmp_path / "home-of-qvxavier"
    home.mkdir()
    with FakeHub(token=TOKEN) as hub:
        env = {**environment(hub, home / ".hf", xet=xet), "HOME": str(home), "USER": "qvxavier"}
        command = [sys.executable, "-c", TWICE, "push", str(run), "me/tiny"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/tiny"]
    assert repo.private
    assert set(repo.files) == NAMES | {".gitattributes"}
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    first, second, _ = done.stdout.split("--\n")
    assert "pushed to" in first
    assert "nothing changed in" in second
    weights = (run / "adapter" / "adapters.safetensors").read_bytes()
    assert repo.lfs["adapters.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert bool(hub.stored) == xet
    if not xet:
        assert repo.files["adapters.safetensors"] == weights
    _check_nothing_is_told(hub, run, tmp_path)
    assert TOKEN not in done.stdout + done.stderr
    assert not any("harness" in path for _, path, _ in hub.calls)


def _check_nothing_is_told(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    """Look through every byte that any request carried, and every file as it arrived."""
    sent = hub.seen.replace(f"Bearer {TOKEN}".encode(), b"") + b"".join(hub.blobs.values())
    for commit in re.findall(rb'"content":\s*"([^"]+)"', hub.seen):
        sent += base64.b64decode(commit) if re.fullmatch(rb"[\w+/=]+", commit) else b""
    assert b"# tiny" in sent  # the card, out of the commit
    places = (run, run.parent, tmp_path, Path.home(), Path.cwd())
    for planted in (SECRET, TOKEN, "qvxavier", *map(str, places)):
        assert planted.encode() not in sent, planted
    host = socket.gethostname()
    assert len(host) < 4 or host.encode() not in sent


def test_a_dry_run_lists_names_and_bytes_and_calls_nobody(hub, push, run):
    status, printed = push("me/tiny", "--dry-run", "--public")
    assert status == 0
    listed = {line.split()[1]: line.split()[0] for line in printed.splitlines()[:-1]}
    assert listed.keys() == NAMES
    size = (run / "adapter" / "adapters.safetensors").stat().st_size
    assert listed["adapters.safetensors"] == f"{size:,}"
    assert not hub.calls


def test_samples_leave_only_when_asked_for(hub, push):
    status, _ = push("me/tiny", "--with-samples", "--task-name", "zebra  riddles")
    card = hub.repos["me/tiny"].files["README.md"].decode()
    assert status == 0
    assert f"````text\n{SECRET}\n```\n# not a heading\n````" in card
    assert "- Task: zebra riddles\n" in card


def test_a_public_repository_stops_the_push(hub, push):
    repo = hub.put("me/tiny", {".gitattributes": b""}, private=False)
    status, printed = push("me/tiny")
    assert status == 6
    assert "me/tiny is public, so nothing was uploaded" in printed
    assert set(repo.files) == {".gitattributes"}
    assert not any("commit" in route or "preupload" in route for route in hub.routes())

    assert push("me/tiny", "--public")[0] == 2  # no terminal to ask on
    assert set(repo.files) == {".gitattributes"}
    status, printed = push("me/tiny", "--public", "--yes")
    assert status == 0
    assert "(public)" in printed
    assert set(repo.files) > NAMES


@pytest.mark.parametrize(("answer", "pushed"), [("n", False), ("", False), ("y", True)])
def test_on_a_terminal_public_is_asked(hub, push, monkeypatch, answer, pushed):
    with terminal(answer) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, printed = push("me/tiny", "--public")
    assert "me/tiny will be readable by everyone. Push?" in printed
    assert ("me/tiny" in hub.repos, status == 0) == (pushed, pushed)


def test_public_makes_a_public_repository(hub, push):
    assert push("me/tiny", "--public", "--yes")[0] == 0
    assert not hub.repos["me/tiny"].private


def test_a_repository_that_turns_out_public_gets_nothing(hub, push):
    def put(name, files, *, private):
        return FakeHub.put(hub, name, files, private=False)

    hub.put = put  # a Hub that does not listen
    status, printed = push("me/tiny")
    assert status == 6
    assert "is public" in printed
    assert set(hub.repos["me/tiny"].files) == {".gitattributes"}


def test_what_localrl_did_not_push_is_left_alone(hub, push):
    repo = hub.put("me/tiny", {"model.safetensors": b"x", "README.md": b"mine"}, private=True)
    status, printed = push("me/tiny")
    assert status == 6
    assert "did not push (model.safetensors)" in printed
    assert repo.files["README.md"] == b"mine"


def test_what_does_not_belong_to_these_weights_goes(hub, push, run, tmp_path):
    assert push("me/tiny")[0] == 0
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "adapter" / "adapter_model.safetensors").unlink()
    note = json.loads((other / "adapter" / "localrl.json").read_text())
    del note["sha256"]["adapter_model.safetensors"]
    note["peft_left_out"] = "it was taken away"
    (other / "adapter" / "localrl.json").write_text(json.dumps(note))
    assert push("me/tiny", folder=other)[0] == 0
    files = hub.repos["me/tiny"].files
    assert set(files) == NAMES - {"adapter_model.safetensors"} | {".gitattributes"}
    assert b"no weights in PEFT format: it was taken away" in files["README.md"]


def bad_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def no_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")


def read_only(hub, monkeypatch):
    hub.readonly = True


def offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def nobody_there(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def never_answers(hub, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_S", 0.1)
    monkeypatch.delenv("HF_HUB_DOWNLOAD_TIMEOUT", raising=False)
    hub.stall("GET", "whoami")


def changed_meanwhile(hub, monkeypatch):
    def fault(method, path):
        if "preupload" in path:
            hub.repos["me/tiny"].commit("by someone else", [])

    monkeypatch.setattr(hub, "fault", fault)


def card_refused(hub, monkeypatch):
    errors = [{"message": "tags must be a list"}]
    hub.fail("POST", "validate-yaml", 400, body={"errors": errors, "warnings": []})


def no_room(hub, monkeypatch):
    hub.fail("POST", "/commit/", 403, body={"error": "Private repository storage limit reached"})


def no_money(hub, monkeypatch):
    hub.fail("POST", "repos/create", 402, body={"error": "Payment required \x1b[31m" + TOKEN})


def always_failing(hub, monkeypatch):
    hub.fail("POST", "/commit/", 500, times=3)


def too_many(hub, monkeypatch):
    hub.fail("GET", "whoami", 429)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (no_token, "no token for the Hub on this machine. Run `hf auth login`"),
        (bad_token, "refused the token in the environment variable HF_TOKEN"),
        (read_only, "(403). It says: You don't have the rights to write under this namespace."),
        (offline, "HF_HUB_OFFLINE is set"),
        (nobody_there, "did not answer (ConnectError"),
        (never_answers, "did not answer (ReadTimeout"),
        (changed_meanwhile, "changed the repository in the meantime (412)"),
        (card_refused, "refused the model card; please report this"),
        (no_room, "It says: Private repository storage limit reached."),
        (no_money, "It says: Payment required [31m(a token)."),
        (always_failing, "answered with status 500. It says: made to fail."),
        (too_many, "is rate limiting this client (429)"),
    ],
)
def test_every_failure_is_one_sentence_and_the_command_for_later(
    hub, push, run, monkeypatch, trouble, words
):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    trouble(hub, monkeypatch)
    status, printed = push("me/tiny")
    assert status == 6
    error = printed.partition("Error: ")[2]
    assert words in error
    assert error.strip().endswith(f"push it later with: localrl push '{run}' me/tiny")
    assert "hf_wrong" not in printed
    assert TOKEN not in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert NAMES & set(hub.repos["me/tiny"].files if "me/tiny" in hub.repos else ()) == set()


def test_an_upload_that_fails_goes_on_where_it_was(hub, push):
    hub.fail("POST", "/commit/", 400, body={"error": "the scanner is unwell"})
    assert push("me/tiny")[0] == 6
    assert push("me/tiny")[0] == 0
    sent = [route for route in hub.routes() if route.startswith("PUT")]
    assert len(sent) == 2  # each file of weights once, though it took two pushes


def test_what_passes_by_itself_is_tried_again(hub, push):
    hub.drop("POST", "/commit/")
    hub.fail("POST", "/commit/", 503)
    status, printed = push("me/tiny")
    assert status == 0, printed
    assert len(hub.repos["me/tiny"].commits) == 2
    assert sum("/commit/" in route for route in hub.routes()) == 3


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("tiny", "user/tiny"),
        ("me/my adapter!", "me/my-adapter"),
        ("a/b/c", "a-b/c"),
        ("/", "user/"),
    ],
)
def test_a_name_that_the_hub_does_not_take_gets_a_suggestion(push, name, suggestion):
    status, printed = push(name)
    assert status == 2
    assert f"{name!r} is not a Hub repository id" in printed
    assert f"Try {suggestion}" in printed


def test_a_run_without_a_base_on_the_hub_names_the_flag(push, run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    note = json.loads((other / "adapter" / "localrl.json").read_text())
    (other / "adapter" / "localrl.json").write_text(json.dumps({**note, "base_model": None}))
    status, printed = push("me/tiny", folder=other)
    assert status == 2
    assert "--base-id user/name" in printed
    assert push("me/tiny", "--base-id", str(tmp_path), folder=other)[0] == 2
    status, printed = push("me/tiny", "--dry-run", folder=other)
    assert status == 0
    assert all(name in printed for name in NAMES)
    assert "no known Hub id; user/name stands for it here. A push needs" in printed
    assert push("me/tiny", "--base-id", "acme/tiny", "--dry-run", folder=other)[0] == 0


def test_a_folder_that_is_no_run_is_refused(push, tmp_path):
    status, printed = push("me/tiny", folder=tmp_path)
    assert status == 2
    assert "is not a localrl run" in printed


def test_a_damaged_adapter_is_not_pushed(push, run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    with (other / "adapter" / "adapters.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert push("me/tiny", "--dry-run", folder=other)[0] == 5


@pytest.mark.parametrize("leak", [str(Path.home() / "models"), TOKEN])
def test_bytes_that_name_this_machine_are_held_back(push, run, tmp_path, leak):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    path = other / "adapter" / "localrl.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "versions": {"localrl": leak}}))
    status, printed = push("me/tiny", "--dry-run", folder=other)
    assert status == 4
    assert "localrl.json contains" in printed
    assert TOKEN not in printed
