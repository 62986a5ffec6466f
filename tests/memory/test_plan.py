from __future__ import annotations

import pytest

from localrl.config import RunConfig
from localrl.memory import plan as plan_module
from localrl.memory.machine import available_bytes, resident_bytes
from localrl.memory.plan import make_plan

MEBIBYTE = 2**20


def plan(on_cpu=True, dense=100 * MEBIBYTE, vocabulary=1000, **settings):
    config = RunConfig.create({"model.path": "m", **settings})
    return make_plan(config, vocabulary=vocabulary, dense_bytes=dense, on_cpu=on_cpu, threads=2)


def test_sizes_that_were_asked_for_are_kept():
    made = plan(**{"memory.decode_rows": 3, "memory.micro_rows": 2, "memory.head_chunk": 7})
    assert (made.decode_rows, made.micro_rows, made.head_chunk) == (3, 2, 7)
    assert (made.group_size, made.max_completion_tokens) == (2, 256)


def test_the_others_are_chosen():
    made = plan(**{"rollout.prompts_per_step": 4, "rollout.group_size": 6})
    assert made.decode_rows == 24
    assert made.micro_rows == 4096 // (512 + 256)
    assert made.head_chunk == 64 * MEBIBYTE // 4 // 1000
    assert plan(vocabulary=10_000_000).head_chunk == 16


@pytest.mark.parametrize(
    ("free", "dequantised"), [(300 * MEBIBYTE, True), (200 * MEBIBYTE, False), (None, False)]
)
def test_the_base_is_dequantised_when_there_is_room(monkeypatch, free, dequantised):
    monkeypatch.setattr(plan_module, "available_bytes", lambda: free)
    assert plan().dequantise is dequantised


def test_on_a_gpu_the_base_stays_quantised():
    assert not plan(on_cpu=False).dequantise


@pytest.mark.parametrize(("wish", "dequantised"), [("on", True), ("off", False)])
def test_the_user_may_say(wish, dequantised):
    assert plan(on_cpu=False, **{"memory.dequantise": wish}).dequantise is dequantised


def test_readings_of_this_machine(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       2000 kB\nMemAvailable:    1500 kB\n")
    assert available_bytes(file) == 1500 * 1024
    assert available_bytes(tmp_path / "none") is None
    assert resident_bytes(tmp_path / "none") is None
