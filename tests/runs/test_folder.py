"""The run folder with real files, real locks and real processes."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from forests import forest, scored

import localrl
from localrl.errors import ConfigError, DataError
from localrl.records import DropReason, Example, Group, Leaf, MemoryPlan, Node, ScoredGroup
from localrl.runs import folder as folder_module
from localrl.runs.folder import default_run_path, open_run, package_versions, reopen_run
from localrl.runs.logs import GroupRecord, read_jsonl, rollout_line, to_json, write_atomic

PACKAGE_PARENT = Path(localrl.__path__[0]).parent
OPEN_AND_WAIT = """
import sys
from pathlib import Path
from localrl.errors import ConfigError
from localrl.runs.folder import open_run
input()
try:
    folder = open_run(Path(sys.argv[1]), overwrite=len(sys.argv) > 2)
except ConfigError as error:
    print("refused:", error, flush=True)
else:
    print("opened", flush=True)
    input()
"""


def start_opener(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that opens the folder when it reads a line, and holds it until the next."""
    return subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_WAIT, str(out), *arguments],
        env=os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def say_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def node(parent: int, values: list[float], **fields: object) -> Node:
    n = len(values)
    settings = {"sampled": np.ones(n, bool)} | fields
    logprobs = np.array(values, np.float32)
    tokens = np.arange(n, dtype=np.int32)
    return Node(parent, tokens, sampled_logprobs=logprobs, entropies=-logprobs, **settings)  # type: ignore


def record(text: str = "7", dropped: DropReason | None = None) -> GroupRecord:
    group = Group(
        example=Example("sum-1", ({"role": "user", "content": "3+4"},), "7"),
        prompt_ids=(5,),
        nodes=(
            node(-1, [-0.123456, 0.0]),
            node(0, [-1.0], sampled=np.array([False]), cond_weight=0.5, version=3),
        ),
        leaves=(Leaf(1, "stop", text),),
        planned_roots=4,
    )
    scored = ScoredGroup(group, (0.5,), {"right": (1.0,), "format": (None,)})
    return GroupRecord(scored, (None, 0.25), (dropped,))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_new_or_empty_folder_gets_marker_and_logs(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    out = tmp_path / "my runs é"
    make(out)
    with open_run(out, overwrite=False, versions={"mlx": "0.32.4", "mlx_lm": None}):
        marker = json.loads((out / "run.json").read_bytes())
    assert marker["format"] == 1
    assert marker["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (marker["mlx"], marker["mlx_lm"]) == ("0.32.4", None)
    assert datetime.fromisoformat(marker["created"]).utcoffset() is not None
    assert set(marker) >= {"localrl", "platform"}


def test_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty.*--out.*--resume.*--overwrite"):
        open_run(tmp_path, overwrite=False)
    with pytest.raises(ConfigError, match=r"no run\.json"):
        open_run(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_process_leaves_that_was_killed_before_it_began_is_no_run(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid 7 on here")
    (tmp_path / ".run.json.tmp-7").write_text("{")
    with open_run(tmp_path, overwrite=False):
        assert (tmp_path / "run.json").is_file()
    with pytest.raises(ConfigError, match="not empty"):
        open_run(tmp_path, overwrite=False)


def test_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out cannot be created: Not a directory"):
        open_run(tmp_path / "out", overwrite=True)


def test_overwrite_renames_and_keeps_everything(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for number in range(3):
        with open_run(out, overwrite=True) as folder:
            folder.metrics({"step": number})
    old = sorted(path for path in tmp_path.iterdir() if path != out)
    assert len(old) == 2
    assert all(path.name.startswith("run.old-20") for path in old)
    steps = [next(read_jsonl(path / "metrics.jsonl"))["step"] for path in [*old, out]]
    assert sorted(steps) == [0, 1, 2]
    assert steps[-1] == 2


def test_closing_releases_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(out, overwrite=False), pytest.raises(ConfigError, match=f"pid {os.getpid()} on"):
        open_run(out, overwrite=True)
    open_run(out, overwrite=True).close()


def test_living_holder_blocks_and_dead_one_does_not(tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = start_opener(out)
    say_go(holder)
    assert first_line(holder) == "opened\n"
    with pytest.raises(ConfigError, match=rf"used by another process \(pid {holder.pid} on "):
        open_run(out, overwrite=True)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    open_run(out, overwrite=True).close()
    assert len(list(tmp_path.glob("run.old-*"))) == 1


@pytest.mark.parametrize("arguments", [(), ("--overwrite",)])
def test_of_processes_at_once_one_gets_the_folder(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    if arguments:
        open_run(out, overwrite=False).close()
    openers = [start_opener(out, *arguments) for _ in range(4)]
    for opener in openers:
        say_go(opener)
    answers = sorted(first_line(opener) for opener in openers)
    for opener in openers:
        opener.communicate("\n")
    assert answers[0] == "opened\n"
    assert [answer[:23] for answer in answers[1:]] == ["refused: The run folder"] * 3, answers
    assert len(list(tmp_path.iterdir())) == 1 + len(arguments)


def test_rival_that_came_and_went_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock_after_rival(out: Path) -> object:
        monkeypatch.undo()
        open_run(out, overwrite=False).close()
        return folder_module._lock(out)

    monkeypatch.setattr(folder_module, "_lock", lock_after_rival)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        open_run(tmp_path / "run", overwrite=False)


def test_folder_renamed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def flock_after_rename(file: TextIO, operation: int) -> None:
        monkeypatch.undo()
        out.rename(tmp_path / "moved")
        fcntl.flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_rename)
    with open_run(out, overwrite=False), pytest.raises(ConfigError, match="used by another"):
        open_run(out, overwrite=True)
    assert [path.name for path in (tmp_path / "moved").iterdir()] == [".lock"]


def test_config_and_plan(tmp_path: Path) -> None:
    plan = MemoryPlan(8, 64, 64, 4, 128, 256, 512, False, True, None, None, 6 << 30, "fits")
    with open_run(tmp_path / "run", overwrite=False) as folder:
        folder.write_config('name = "größe"\n')
        folder.write_plan(plan)
        assert (folder.path / "config.toml").read_text("utf-8") == 'name = "größe"\n'
        stored = json.loads((folder.path / "plan.json").read_bytes())
    assert MemoryPlan(**stored) == plan


def test_lines_are_strict_json(tmp_path: Path) -> None:
    values = {
        "nan": math.nan,
        "inf": [np.float32(np.inf), 1.5],
        "count": np.int64(3),
        "flag": np.bool_(True),
        "array": np.array([0.5, np.nan]),
        "text": "größe\u2028\ud800",
        "path": Path("a/b"),
        "pair": (1, None),
    }
    with open_run(tmp_path / "run", overwrite=False) as folder:
        folder.metrics(values)
        line = (folder.path / "metrics.jsonl").read_bytes()  # flushed without closing
    assert line.endswith(b"\n")
    assert "größe" in line.decode("utf-8")
    assert json.loads(line, parse_constant=pytest.fail) == {
        "nan": None,
        "inf": [None, 1.5],
        "count": 3,
        "flag": True,
        "array": [0.5, None],
        "text": "größe\u2028\ud800",
        "path": "a/b",
        "pair": [1, None],
    }


def test_events_carry_time_and_kind(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", overwrite=False) as folder:
        folder.event("plan_revised", step=3, reason="pressure")
    [event] = read_jsonl(tmp_path / "run" / "events.jsonl")
    assert datetime.fromisoformat(event.pop("time")).utcoffset() is not None
    assert event == {"kind": "plan_revised", "step": 3, "reason": "pressure"}


def test_rollout_line(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", overwrite=False) as folder:
        folder.rollouts(7, [record(dropped="no reward")])
    assert b"-0.0" not in (tmp_path / "run" / "rollouts.jsonl").read_bytes()
    [line] = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert line == {
        "format": 1,
        "step": 7,
        "example": "sum-1",
        "messages": [{"role": "user", "content": "3+4"}],
        "prompt_ids": [5],
        "planned_roots": 4,
        "nodes": [
            {
                "parent": -1,
                "token_ids": [0, 1],
                "sampled_logprobs": [-0.1235, 0.0],
                "entropies": [0.1235, 0.0],
                "advantage": None,
            },
            {
                "parent": 0,
                "token_ids": [0],
                "sampled_logprobs": [-1.0],
                "entropies": [1.0],
                "advantage": 0.25,
                "sampled": [False],
                "cond_weight": 0.5,
                "version": 3,
            },
        ],
        "leaves": [
            {
                "node": 1,
                "finish_reason": "stop",
                "reward": 0.5,
                "parts": {"right": 1.0, "format": None},
                "text": "7",
                "dropped": "no reward",
            }
        ],
        "kept": False,
        "reason": "no reward",
    }


def test_defaults_are_left_out_of_a_line_and_all_else_is_there() -> None:
    plain = rollout_line(1, record())
    assert (plain["kept"], plain["reason"]) == (True, None)
    assert "dropped" not in plain["leaves"][0]
    nodes = (
        node(-1, [-0.5, -1.0], round=1, version=2, old_logprobs=np.array([-0.25004, -0.0])),
        node(0, [-2.0]),
        node(0, [-3.0]),
    )
    leaves = (Leaf(1, "loop", "a"), Leaf(2, "closed", "b"))
    group = replace(record().scored.group, nodes=nodes, leaves=leaves)
    scored = ScoredGroup(group, (1.0, 0.0), {})
    line = rollout_line(1, GroupRecord(scored, (0.5, 0.0, -0.5), (None, "truncated")))
    assert line["kept"]
    assert (line["nodes"][0]["round"], line["nodes"][0]["version"]) == (1, 2)
    assert line["nodes"][0]["old_logprobs"].tolist() == [-0.25, 0.0]
    assert not {"round", "old_logprobs", "version", "sampled"} & set(line["nodes"][1])
    assert [leaf.get("dropped") for leaf in line["leaves"]] == [None, "truncated"]
    assert [leaf["finish_reason"] for leaf in line["leaves"]] == ["loop", "closed"]


@pytest.mark.parametrize(
    ("dropped", "kept", "reason"),
    [
        ((None, None), True, None),
        (("no reward", None), True, None),
        (("no reward", "no reward"), False, "no reward"),
        (("no coefficient", "no coefficient"), False, "no coefficient"),
        (("no reward", "truncated"), False, "no coefficient"),
    ],
)
def test_the_reason_of_a_group_is_that_of_all_its_completions(dropped, kept, reason) -> None:
    tree = forest([-1, -1], leaves=[0, 1], planned_roots=2)
    whole = GroupRecord(scored(tree, [1.0, 0.0]), (0.0, 0.0), dropped)
    line = rollout_line(1, whole)
    assert (line["kept"], line["reason"]) == (kept, reason)


def test_past_the_limit_every_tenth_group_is_written(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", overwrite=False, rollout_log_limit=1500) as folder:
        for step in range(40):
            folder.rollouts(step, [record(f"{step}/{i}") for i in range(4)])
        size = folder.sizes()["rollouts"]
    lines = list(read_jsonl(tmp_path / "run" / "rollouts.jsonl"))
    texts = [line["leaves"][0]["text"] for line in lines]
    whole = next(i for i, text in enumerate(texts) if text != f"{i // 4}/{i % 4}")
    assert size > 1500
    assert 3 <= whole <= 4
    assert texts[whole:] == [
        f"{step}/{i}" for step in range(1, 40) for i in range(4) if (step + i) % 10 == 0
    ]
    [event] = read_jsonl(tmp_path / "run" / "events.jsonl")
    assert (event["kind"], event["every"]) == ("rollouts_thinned", 10)
    assert event["limit_bytes"] == 1500


def test_the_sizes_are_those_on_disk(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", overwrite=False) as folder:
        folder.metrics({"step": 1, "reward": 0.5})
        folder.event("é")
        sizes = folder.sizes()
        assert sizes == {"metrics": len(b'{"step": 1, "reward": 0.5}\n'), "rollouts": 0}
        assert (folder.path / "metrics.jsonl").stat().st_size == sizes["metrics"]


def test_a_run_goes_on_where_its_logs_are_cut(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", overwrite=False) as folder:
        folder.metrics({"step": 1})
        folder.event("begun")
        sizes = folder.sizes()
        folder.metrics({"step": 2})
        with pytest.raises(ConfigError, match="used by another process"):
            reopen_run(tmp_path / "run")
    with (tmp_path / "run" / "events.jsonl").open("ab") as events:
        events.write(b'{"kind": "to')
    with reopen_run(tmp_path / "run") as folder:
        folder.event("resumed")
        assert folder.cut(1, sizes) == []
        folder.metrics({"step": 2, "again": True})
    metrics = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert metrics == [{"step": 1}, {"step": 2, "again": True}]
    assert [e["kind"] for e in read_jsonl(tmp_path / "run" / "events.jsonl")] == [
        "begun",
        "resumed",
    ]


ONE, TWO, THREE, FOUR = (f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
NULS = "\0" * 40
DAMAGED = {
    # the text of the log, the steps that it keeps, and True if it has lost some
    "empty": ("", [], True),
    "short": (ONE, [1], True),
    "cut within a line": (ONE + '{"st', [1], True),
    "cut before the line's end": (ONE.strip(), [], True),
    "a line removed": (ONE + THREE + FOUR, [1, 3], True),
    "a blank line": (ONE + "\n" + TWO + THREE + FOUR, [1, 2, 3], False),
    "a line doubled": (ONE + TWO + TWO + THREE + FOUR, [1, 2, 2, 3], False),
    "NULs before a line": (ONE + NULS + TWO + THREE + FOUR, [1, 3], True),
    "NULs over a line and its end": (ONE + NULS[: len(TWO)] + THREE + FOUR, [1], True),
    "NULs over a line": (ONE + NULS[1 : len(TWO)] + "\n" + THREE + FOUR, [1, 3], True),
    "NULs at the end": (ONE + TWO + THREE + NULS, [1, 2, 3], False),
    "other lines": ("[1]\n7\n" + ONE + '{"stop": 2}\n' + TWO + THREE, [1, 2, 3], False),
}


@pytest.mark.parametrize(("text", "kept", "lost"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_log_keeps_its_whole_lines(tmp_path: Path, text, kept, lost) -> None:
    with open_run(tmp_path / "run", overwrite=False) as folder:
        for step in (1, 2, 3):
            folder.metrics({"step": step})
        sizes = folder.sizes()
        assert folder.has_metrics(3, sizes)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    with reopen_run(tmp_path / "run") as folder:
        assert folder.has_metrics(3, sizes) == (not lost)
        assert folder.cut(3, sizes) == ["metrics.jsonl"] * lost
        folder.metrics({"step": 4})
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*kept, 4]
    names = {path.name for path in (tmp_path / "run").glob("*metrics*")}
    assert names == {"metrics.jsonl"}


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no run in"):
        reopen_run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = to_json({"step": 1, "text": "é"}) + b"\n"
    for cut in range(len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert len(list(read_jsonl(path))) == 1
    path.write_bytes(whole + whole)
    assert len(list(read_jsonl(path))) == 2


@pytest.mark.parametrize("bad", [b"{torn\n", b"[1]\n", b"\xff\n", b"\n"])
def test_broken_line_in_the_middle_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" + bad + b"{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        list(read_jsonl(path))


def test_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_atomic(path, b"old")

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_default_path_is_the_first_free_one(tmp_path: Path) -> None:
    assert default_run_path(tmp_path / "runs", "sums") == tmp_path / "runs" / "sums-1"
    (tmp_path / "sums-1").mkdir()
    (tmp_path / "sums-2").write_text("")
    assert default_run_path(tmp_path, "sums") == tmp_path / "sums-3"
    assert default_run_path(tmp_path, "../org/Model 0.5B") == tmp_path / "org-Model-0.5B-1"


def test_package_versions_import_nothing() -> None:
    code = (
        "import sys; from localrl.runs.folder import package_versions;"
        "print(package_versions(['mlx-lm', 'no-such-package']), 'mlx_lm' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    versions = package_versions(["mlx-lm", "no-such-package"])
    assert versions["mlx_lm"] is not None
    assert versions["no_such_package"] is None
    assert done.stdout.decode() == f"{versions} False\n"


FULL = """
import resource, signal, sys
from pathlib import Path
from localrl.errors import CheckpointError
from localrl.runs.logs import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = JsonLines(Path(sys.argv[1]))
log.append({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
try:
    log.append({"step": 2, "text": "x" * 100})
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append({"step": 3})
"""


def test_a_line_that_finds_no_room_is_not_there_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    said = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert "cannot be written: File too large" in said.stdout
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 3}]
