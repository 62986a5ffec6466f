"""`localrl pull` from a Hub of our own: sizes first, data and never code, and then offline."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
from fake_hub import FakeHub, attach, environment, terminal
from waiting import DEADLINE_S

from localrl.cli.main import main
from localrl.errors import ConfigError
from localrl.export import pull as pulling
from localrl.policy.loading import find_model
from localrl.policy.model import load_model
from localrl.tasks.files import load_file_task

OTHER = {
    "modeling_tiny.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04.",
    "training_args.pt": b"x",
    "README.md": b"# a card",
}
ROWS = b'{"prompt": "1+1", "answer": "2"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    """The files of a tiny model, with code and pickles beside them."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("models") / "pulled")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | OTHER


@pytest.fixture
def hub(tmp_path, monkeypatch, model):
    with FakeHub() as hub:
        attach(hub, tmp_path / "home", monkeypatch)
        monkeypatch.delenv("HF_TOKEN")
        hub.put("acme/tiny", model)
        hub.put("datasets/acme/rows", {"train.jsonl": ROWS, "data.parquet": b"x"})
        hub.put("datasets/acme/shards", {f"train-{n}-of-2.jsonl": ROWS for n in range(2)})
        hub.put("datasets/acme/scripts", {"rows.py": b"raise SystemExit"})
        yield hub


@pytest.fixture
def pull(monkeypatch, capsys):
    """The command in this process: its exit code and what it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        words = ["pull", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["localrl", *words])
        with pytest.raises(SystemExit) as done:
            main(words)
        printed = capsys.readouterr()
        return int(done.value.code or 0), printed.out + printed.err

    return call


def downloads(hub: FakeHub) -> list[str]:
    """Names of the files whose bytes were sent."""
    return [
        path.rpartition("/")[2] for verb, path, _ in hub.calls if verb == "GET" if "/res" in path
    ]


def test_a_model_is_pulled_whole_and_then_loads_offline(tmp_path, model, monkeypatch):
    with FakeHub() as hub:
        hub.put("acme/tiny", model)
        done = subprocess.run(
            [sys.executable, "-m", "localrl", "pull", "acme/tiny"],
            env=environment(hub, tmp_path), capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        attach(hub, tmp_path, monkeypatch)
    wanted = {name for name in model if name not in OTHER} | {"README.md"}
    assert set(downloads(hub)) == wanted
    folder = find_model("acme/tiny")  # the Hub is gone by now
    assert {path.name for path in folder.iterdir()} == wanted
    load_model(folder)
    assert "left out  modeling_tiny.py, pytorch_model.bin, training_args.pt" in done.stdout
    weights = len(model["model.safetensors"]) / 1e3
    assert f"weights of {weights:.1f} kB" in done.stdout
    assert "next: localrl train --model acme/tiny" in done.stdout


def test_a_second_pull_fetches_nothing(hub, pull):
    assert pull("acme/tiny")[0] == 0
    before = len(downloads(hub))
    status, printed = pull("acme/tiny")
    assert status == 0
    assert "already in the cache" in printed
    assert len(downloads(hub)) == before


def test_a_cut_download_goes_on_where_it_was(hub, pull, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    hub.cut("GET", "model.safetensors")
    status, printed = pull("acme/tiny")
    assert status == 0, printed
    sent = [status for verb, path, status in hub.calls if verb == "GET" if "model.safetens" in path]
    assert sent == [200, 206]
    load_model(find_model("acme/tiny"))


def test_what_is_half_there_is_not_taken_for_a_model(hub, pull):
    hub.fail("GET", "resolve/.*/model.safetensors", 404, times=9)
    status, printed = pull("acme/tiny")
    assert status == 6
    assert "continue with: localrl pull acme/tiny" in printed
    with pytest.raises(Exception, match="localrl pull acme/tiny"):
        find_model("acme/tiny")


def test_too_small_a_disk_is_said_before_anything_is_fetched(hub, pull, monkeypatch):
    monkeypatch.setattr(pulling, "SPARE_BYTES", 2**60)
    status, printed = pull("acme/tiny", "--yes")
    assert status == 6
    assert "needed. Free some space" in printed
    assert not downloads(hub)


@pytest.mark.parametrize(
    ("left_out", "words"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights in model*.safetensors")],
)
def test_what_is_no_model_is_not_fetched(hub, pull, model, left_out, words):
    hub.put("acme/other", {name: data for name, data in model.items() if name != left_out})
    status, printed = pull("acme/other")
    assert status == 6
    assert words in printed
    assert not downloads(hub)


@pytest.mark.parametrize(("answer", "fetched"), [("n", False), ("y", True)])
def test_on_a_terminal_it_asks(hub, pull, monkeypatch, answer, fetched):
    with terminal(answer) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, printed = pull("acme/tiny")
    assert "Download?" in printed
    assert bool(downloads(hub)) == fetched
    assert (status == 0) == fetched


def test_one_file_of_a_data_set_is_fetched_and_copied(hub, pull, tmp_path):
    out = tmp_path / "my rows.jsonl"
    status, printed = pull("--data", "acme/rows:train.jsonl", "--out", out)
    assert status == 0, printed
    assert out.read_bytes() == ROWS
    assert f"localrl train --task '{out}'" in printed
    assert downloads(hub) == ["train.jsonl"]

    out.write_bytes(b"changed")
    status, printed = pull("--data", "acme/rows:train.jsonl", "--out", out)
    assert status == 2
    assert "already exists and was not changed" in printed
    assert out.read_bytes() == b"changed"
    nowhere, link = tmp_path / "nowhere", tmp_path / "link"
    link.symlink_to(nowhere)
    assert pull("--data", "acme/rows:train.jsonl", "--out", link)[0] == 2
    assert not nowhere.exists()


def test_a_data_set_is_pulled_as_a_task_opens_it_and_then_opened_offline(tmp_path, monkeypatch):
    """One of two parts, with shards and a held-out table; nothing else is fetched."""
    lines = [json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) for i in range(6)]
    files = {
        "README.md": b"# rows",
        "easy/train-00000-of-00002.jsonl": "\n".join(lines[:2]).encode(),
        "easy/train-00001-of-00002.jsonl": "\n".join(lines[2:4]).encode(),
        "easy/test-00000-of-00001.jsonl": "\n".join(lines[4:]).encode(),
        "hard/train-00000-of-00001.jsonl": b"{}",
        "script.py": b"raise SystemExit",
    }
    with FakeHub() as hub:
        hub.put("datasets/acme/sums", files)
        done = subprocess.run(
            [sys.executable, "-m", "localrl", "pull", "--data", "acme/sums:easy"],
            env=environment(hub, tmp_path), capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        attach(hub, tmp_path, monkeypatch)
    assert {name.partition("-")[0] for name in downloads(hub)} == {"train", "test"}
    assert len(downloads(hub)) == 3
    assert "train on  easy/train-00000-of-00002.jsonl, easy/train-00001-of-00002" in done.stdout
    assert "localrl train --task acme/sums:easy" in done.stdout

    monkeypatch.chdir(tmp_path)
    task = load_file_task("acme/sums:easy", ())  # the Hub is gone by now
    assert [example.answer for example in task.training] == ["1", "2", "3", "4"]
    assert {example.answer for example in task.held_out} == {"5", "6"}
    with pytest.raises(ConfigError, match="several tables to train on: easy, hard"):
        load_file_task("acme/sums", ())
    with pytest.raises(ConfigError, match=r"pull --data acme/sums:hard`"):
        load_file_task("acme/sums:hard", ())  # the client remembers what the Hub has
    with pytest.raises(ConfigError, match=r"pull --data acme/others`"):
        load_file_task("acme/others", ())


def test_a_data_set_that_another_program_fetched_is_opened(tmp_path, monkeypatch):
    """Such a cache may have no list of the Hub's files, and no main."""
    with FakeHub() as hub:
        attach(hub, tmp_path, monkeypatch)
    snapshot = tmp_path / "hub" / "datasets--acme--rows" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").write_bytes(ROWS + ROWS.replace(b"1+1", b"2+0"))
    assert load_file_task("acme/rows", ()).train_size == 1
    with pytest.raises(ConfigError, match=r"no table 'test'.*If the Hub has more: .*rows:test`"):
        load_file_task("acme/rows:test", ())


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "Name one thing to pull"),
        (("acme/tiny", "--data", "acme/rows:train.jsonl"), 2, "Name one thing to pull"),
        (("acme/tiny", "--out", "there"), 2, "a model stays in the cache"),
        (("--data", "acme/rows:test.jsonl"), 2, "no table 'test.jsonl'. It has data, train."),
        (("--data", "acme/scripts"), 4, "no table of problems (.jsonl"),
        (("--data", "acme/nothing"), 6, "no such repository, or your token may not see it"),
        (("--data", "acme/shards", "--out", "there"), 2, "acme/shards has 2. Name one of them"),
        (("acme/rows",), 6, "A data set is fetched with `localrl pull --data acme/rows`"),
        (("../etc",), 6, "'../etc'. Nothing was downloaded."),
    ],
)
def test_what_cannot_be_pulled_is_one_sentence(hub, pull, arguments, status, words):
    got, printed = pull(*arguments)
    assert got == status
    assert words in printed
    assert not downloads(hub)


def test_a_name_that_leads_out_of_the_cache_is_refused(hub, pull, model, tmp_path):
    hub.put("acme/evil", {**model, "../../evil.json": b"{}"})
    status, printed = pull("acme/evil")
    assert status == 6
    assert "evil.json" in printed
    assert not list(tmp_path.rglob("evil.json"))
