"""Which steps in C are taken: by timing, kept for the next run, and set by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from arrays import array_policy
from waiting import DEADLINE_S

from localrl.backend import kernels
from localrl.engines.cpu import kernel_choice
from localrl.engines.cpu.kernel_choice import (
    COLUMNS,
    NUMPY,
    VARIABLE,
    Choice,
    KernelSizes,
    choose,
    current,
    default,
    steps,
    store,
    use,
    using,
)
from localrl.errors import ConfigError

pytestmark = pytest.mark.skipif(kernels is None, reason="built without a C compiler")

SIZES = KernelSizes(rows=96, inputs=32, ffn=48, heads=4, kv_heads=2, head_dim=16)
EQUAL = [1.0] * len(COLUMNS)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Nothing set by hand, an empty cache, and what was in use is put back."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with using(current()):
        yield


def times(products: float, others: float = 1.0) -> tuple[list[float], dict[str, float]]:
    return [products] * len(COLUMNS), {"attention": others, "gate": others}


@pytest.mark.parametrize(
    ("timings", "expected"),
    [
        ({16: times(0.5), 32: times(0.4), 64: times(0.3)}, 64),
        ({16: times(0.5), 32: times(0.3), 64: times(0.31)}, 64),  # within the margin
        ({16: times(0.5), 32: times(0.3), 64: times(0.6)}, 32),
        ({16: times(2.0, 3.0), 32: times(2.0, 2.0)}, 0),  # NumPy is faster
        ({16: times(2.0, 0.5)}, 16),  # products are left to the BLAS
    ],
)
def test_the_widest_build_that_is_fast(timings, expected):
    assert kernel_choice._fastest(EQUAL, times(1.0)[1], timings).bytes == expected


def test_products_that_are_not_faster_are_left_to_the_blas():
    mine = [0.5, 2.0, *EQUAL[2:]]
    found = kernel_choice._fastest(EQUAL, times(1.0)[1], {32: (mine, times(1.0)[1])})
    assert found.columns == (1,)
    assert found.gains["1 column"] == 2.0
    assert found.takes(1)
    assert not any(map(found.takes, (2, 3, 129)))
    assert [Choice(32, (1, 4)).takes(n) for n in (1, 2, 3, 4, 5)] == [
        True,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.usefixtures("timed")
def test_it_is_timed_once_and_kept(monkeypatch):
    first = choose(SIZES)
    assert first == current()
    assert first.bytes in (0, *kernels.builds())
    assert set(first.gains) >= {"attention", "gate"} or first == NUMPY
    monkeypatch.setattr(kernel_choice, "_measure", None)  # would be called
    assert choose(SIZES) == first
    store().write_text("nothing")
    monkeypatch.setattr(kernel_choice, "_measure", lambda *_: NUMPY)
    assert choose(SIZES) == NUMPY


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("stored", [{"bytes": 128, "columns": [], "gains": {}}, {"bytes": 16}, 3])
def test_a_stored_choice_that_makes_no_sense_is_timed_anew(monkeypatch, stored):
    choose(SIZES)
    known = json.loads(store().read_bytes())
    store().write_text(json.dumps(dict.fromkeys(known, stored)))
    monkeypatch.setattr(kernel_choice, "_measure", lambda *_: NUMPY)
    assert choose(SIZES) == NUMPY


@pytest.mark.usefixtures("timed")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose(SIZES) == current()


@pytest.mark.parametrize("wish", ["numpy", *map(str, kernels.builds() if kernels else [])])
def test_it_can_be_set_by_hand(monkeypatch, wish):
    monkeypatch.setenv(VARIABLE, wish)
    expected = 0 if wish == "numpy" else int(wish)
    assert default().bytes == expected
    with using(default()):
        assert (steps() is None) == (wish == "numpy")


@pytest.mark.parametrize("wish", ["8", "avx2", "-1"])
def test_what_there_is_not_is_named(monkeypatch, wish):
    monkeypatch.setenv(VARIABLE, wish)
    with pytest.raises(ConfigError, match=f"{wish!r}; here it may be numpy or 16"):
        default()


def test_a_model_is_not_opened_with_what_there_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "8")
    with pytest.raises(ConfigError, match="'8'; here it may be"):
        array_policy(tmp_path / "model", "qwen3")


def test_a_build_that_cannot_run_is_an_error():
    before = current()
    with pytest.raises(ConfigError, match="128 bytes"):
        use(Choice(128, ()))
    assert current() == before


NARROW = """
import sys
from localrl import RunConfig, train
from localrl.engines.cpu.kernel_choice import current
out, steps, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
config = RunConfig.create({
    "run.out": out, "run.steps": steps, "task.eval_prompts": 4, "rollout.prompts_per_step": 2,
    "run.checkpoint_every": 1, "task.train_prompts": 8,
})
train(config, resume=resume)
print("used", current().bytes)
"""


def test_a_resumed_run_goes_on_with_its_own(tmp_path):
    """Begun on the narrow build, resumed where the wide one would be chosen: the same bytes."""
    narrow = {**os.environ, VARIABLE: "16"}

    def run(name: str, steps: int, how: str, env: dict[str, str]) -> str:
        command = [sys.executable, "-c", NARROW, str(tmp_path / name), str(steps), how]
        done = subprocess.run(
            command, env=env, check=True, capture_output=True, text=True, timeout=DEADLINE_S
        )
        return done.stdout

    run("whole", 3, "new", narrow)
    run("parts", 2, "new", narrow)
    wide = {**os.environ, VARIABLE: str(kernels.builds()[-1])}
    assert "used 16" in run("parts", 3, "resume", wide)
    adapters = [tmp_path / name / "adapter" / "adapters.safetensors" for name in ("whole", "parts")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
