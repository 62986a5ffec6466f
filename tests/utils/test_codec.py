"""Records as plain data and back, and checkpoints that are whole or not there."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from forests import forest, scored

from localrl.errors import CheckpointError
from localrl.records import Example, Group, Leaf, Node, ScoredGroup
from localrl.runs.checkpoints import Checkpoints, damage
from localrl.utils.codec import decode, encode

TYPES = {kind.__name__: kind for kind in (Example, Group, Leaf, Node, ScoredGroup)}


def there_and_back(value):
    tree, arrays = encode(value, TYPES)
    return decode(json.loads(json.dumps(tree)), arrays, TYPES)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1 + 0.2,
        math.inf,
        "ü\n",
        (1, (2.0, None)),
        [],
        {1: "one", "1": (2,), None: {}},
        {"tuple": 1, "record": 2, "array": 3},
    ],
)
def test_plain_values_come_back_as_they_were(value):
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)


def test_records_come_back_with_their_arrays():
    group = scored(forest([-1, 0, 0], leaves=[1, 2], planned_roots=1), [1.0, None])
    back = there_and_back({"a": (group,)})["a"][0]
    assert back.rewards == group.rewards
    assert back.group.example == group.group.example
    assert back.group.leaves == group.group.leaves
    for one, other in zip(back.group.nodes, group.group.nodes, strict=True):
        assert one.cond_weight == other.cond_weight
        for name in ("token_ids", "sampled", "sampled_logprobs", "entropies"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_nodes_of_older_checkpoints_have_no_scored_logprobs():
    group = forest([-1, 0], leaves=[1], planned_roots=1)
    tree, arrays = encode(group, TYPES)
    for node in tree["fields"]["nodes"]["tuple"]:
        assert node["fields"].pop("scored_logprobs") is None
    back = decode(tree, arrays, TYPES)
    assert [node.scored_logprobs for node in back.nodes] == [None, None]
    assert back.nodes[0].written_logprobs.tolist() == group.nodes[0].sampled_logprobs.tolist()


@dataclass(frozen=True)
class Stranger:
    a: int


@pytest.mark.parametrize("value", [Stranger(1), {1, 2}, np.float32(1), object()])
def test_what_would_come_back_as_something_else_is_refused(value):
    with pytest.raises(TypeError):
        encode([value], TYPES)


def test_a_state_of_another_version_says_so():
    tree, arrays = encode(scored(forest([-1], leaves=[0], planned_roots=1), [1.0]), TYPES)
    tree["fields"]["later"] = 1
    with pytest.raises(CheckpointError, match="another version"):
        decode(tree, arrays, TYPES)


def files(text):
    return {"a.txt": lambda path: path.write_text(text), "b.txt": lambda path: path.write_text("b")}


@pytest.fixture
def store(tmp_path):
    warned: list[str] = []
    store = Checkpoints(tmp_path / "checkpoints", warned.append)
    return store, warned


def test_the_newest_whole_one_is_taken(store):
    checkpoints, warned = store
    assert checkpoints.newest() is None
    for step in (2, 10, 1000000):
        checkpoints.save(step, files(str(step)), 10)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-1000000"
    assert (newest / "a.txt").read_text() == "1000000"
    assert not warned
    checkpoints.prune({10})
    assert checkpoints.steps() == [10]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000010"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["a.txt", "b.txt", "manifest.json"])
def test_a_damaged_one_is_passed_over_with_the_file_named(store, how, name):
    checkpoints, warned = store
    checkpoints.save(1, files("one"), 10)
    last = checkpoints.save(2, files("two"), 10)
    DAMAGE[how](last / name)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-000001"
    assert name in warned[0]
    DAMAGE[how](newest / name)
    with pytest.raises(CheckpointError, match="All 2 checkpoints"):
        checkpoints.newest()


def test_a_failed_write_leaves_what_was(store):
    checkpoints, _ = store
    checkpoints.save(1, files("one"), 10)

    def fail(path):
        path.write_text("half")
        raise RuntimeError("[write] no space left on device")

    with pytest.raises(CheckpointError, match="no space left"):
        checkpoints.save(2, {"a.txt": fail}, 10)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000001"]
    with pytest.raises(CheckpointError, match="are needed"):
        checkpoints.save(2, files("two"), shutil.disk_usage("/").total)
    assert checkpoints.steps() == [1]


def test_the_same_step_again_takes_the_place_of_the_old_one(store):
    checkpoints, _ = store
    checkpoints.save(1, files("one"), 10)
    newest = checkpoints.save(1, files("again"), 10)
    assert (newest / "a.txt").read_text() == "again"
    assert damage(newest) is None


SAVER = """
import sys
from pathlib import Path
from localrl.runs.checkpoints import Checkpoints
store = Checkpoints(Path(sys.argv[1]), print)
store.sweep()
step = max(store.steps(), default=0)
print("ready", flush=True)
while True:
    step += 1
    store.save(step, {"a": lambda p: p.write_bytes(bytes([step % 256]) * 300_000)}, 10)
    store.prune({step, step - 1})
"""


def test_kills_at_any_moment_leave_whole_checkpoints(tmp_path):
    rng, folder, newest = np.random.default_rng(0), tmp_path / "checkpoints", 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        checkpoints = Checkpoints(folder, pytest.fail)
        steps = checkpoints.steps()
        assert all(damage(folder / f"step-{step:06d}") is None for step in steps)
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
    assert newest > 4


def test_replacing_keeps_the_type():
    leaf = Leaf(0, "stop", "x")
    assert there_and_back(replace(leaf, conversation=3)) == replace(leaf, conversation=3)
