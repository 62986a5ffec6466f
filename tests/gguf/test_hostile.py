"""Files that are not what they claim are refused, quickly, in little memory, leaving nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import hostile as files
import numpy as np
import pytest
from waiting import DEADLINE_S
from written import write_model

from localrl.errors import ConfigError
from localrl.gguf.reader import is_gguf, read_gguf

SECONDS = 10.0
"""Of computing, for one file; all of them together take less."""


def ends_of(paths, cache):
    """How reading each of the files ended, in a child with limits; none may leave anything."""
    script = [sys.executable, files.__file__, *map(str, paths)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    found = subprocess.run(
        script, capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == len(paths), found.stderr[-2000:]
    assert not list(cache.rglob("*"))
    assert max(seconds for _, seconds in lines) < SECONDS
    return [ended for ended, _ in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_count_length_and_offset_is_checked(tmp_path):
    cases, paths = list(files.hostile()), []
    for index, (_, data, _) in enumerate(cases):
        paths.append(tmp_path / f"{index}.gguf")
        paths[-1].write_bytes(data)
    ends = ends_of(paths, tmp_path / "cache")
    print(ends)
    for (name, _, message), ended in zip(cases, ends, strict=True):
        assert re.search(message, ended), (name, ended)
        assert ".gguf is refused: " in ended, (name, ended)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_truncated_file_is_named_as_such(tmp_path):
    whole = write_model(tmp_path / "whole.gguf", kind="Q4_0").path.read_bytes()
    start = read_gguf(tmp_path / "whole.gguf").tensors["output_norm.weight"].offset
    rng, paths = np.random.default_rng(3), []
    places = [*rng.integers(4, start, 25), *rng.integers(start, len(whole) - 32, 25)]
    for index, place in enumerate(places):
        paths.append(tmp_path / f"{index}.gguf")
        paths[-1].write_bytes(whole[:place])
    for place, ended in zip(places, ends_of(paths, tmp_path / "cache"), strict=True):
        assert "truncated or damaged" in ended, (place, ended)
        assert "Fetch it again" in ended


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_damaged_header_ends_in_a_model_or_a_refusal(tmp_path):
    whole = write_model(tmp_path / "whole.gguf", kind="Q4_0").path.read_bytes()
    start = read_gguf(tmp_path / "whole.gguf").tensors["output_norm.weight"].offset
    rng, paths = np.random.default_rng(4), []
    for index in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, start, 3):
            data[place] = rng.integers(256)
        paths.append(tmp_path / f"{index}.gguf")
        paths[-1].write_bytes(data)
    script = [sys.executable, files.__file__, *map(str, paths)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = subprocess.run(
        script, capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )
    ends = [json.loads(line)[0] for line in found.stdout.splitlines() if line.startswith("[")]
    assert len(ends) == len(paths), found.stderr[-2000:]
    for ended in ends:
        assert ended == "converted" or " is refused: " in ended or "cannot be read" in ended, ended
    assert any(" is refused: " in ended for ended in ends)


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert not is_gguf(tmp_path / "pipe.gguf")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_gguf(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(tmp_path / "folder.gguf")
    assert not is_gguf(tmp_path / "absent.gguf")
    (tmp_path / "blob").write_bytes(b"GGUF")
    assert is_gguf(tmp_path / "blob")


def test_version_2_and_any_alignment(tmp_path):
    value = files.pair("general.alignment", files.U32, (64).to_bytes(4, "little"))
    head = files.header(1, 1, version=2) + value + files.tensor("a", (2, 3))
    numbers = np.arange(6, dtype=np.float32)
    path = tmp_path / "a.gguf"
    path.write_bytes(head + bytes(-len(head) % 64) + numbers.tobytes())
    file = read_gguf(path)
    assert file.tensors["a"].shape == (3, 2)
    assert np.array_equal(file.raw(file.tensors["a"]).view(np.float32), numbers.reshape(3, 2))
