"""localrl.backend: MLX is fast, exact, and says truthfully what it runs on."""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from waiting import DEADLINE_S

from localrl import backend
from localrl.backend import mx

ROOT = Path(__file__).parents[1]

linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device().type != mx.cpu,
    reason="only MLX's CPU build for Linux needs another BLAS",
)
with_shim = pytest.mark.skipif(
    importlib.util.find_spec("localrl._blas") is None,
    reason="localrl was installed without a C compiler",
)

REPORT = """
import json, numpy
from localrl import backend
from localrl.backend import mx
a = numpy.random.default_rng(0).standard_normal((40, 50), dtype="f")
right = bool(numpy.allclose(numpy.array(mx.array(a) @ mx.array(a).T), a @ a.T, atol=1e-4))
print(json.dumps({**vars(backend.describe()), "right": right}))
"""
HIDE_SHIM = "import sys; sys.modules['localrl._blas'] = None\n"
HIDE_SYSTEM_BLAS = """
import ctypes
class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name and any(part in name for part in ("libopenblas", "libmkl")):
            raise OSError(name + ": hidden by the test")
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = CDLL
"""


def run_child(code: str, *flags: str, **variables: str) -> str:
    """Run code in a fresh interpreter, without inherited thread settings; return its output."""
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    env = {**inherited, "PYTHONPATH": str(Path(backend.__file__).parents[1]), **variables}
    command = [sys.executable, *flags, "-c", code]
    # Elsewhere, since -c looks for modules in the working directory first.
    child = subprocess.run(
        command, env=env, cwd=os.sep, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def report(before: str = "", *flags: str, **variables: str) -> dict[str, Any]:
    """Describe the backend of a child that ran `before` and then imported localrl."""
    return json.loads(run_child(before + REPORT, *flags, **variables))


def best_times(*functions: Callable[[], object], rounds: int = 40) -> list[float]:
    """Return the least processor time of each function, whatever else the machine is doing."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - start)
    return best


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep products on one thread: two that wait for each other on a busy machine time nothing."""
    before = backend.describe().threads
    backend.set_threads(1)
    yield
    backend.set_threads(before or 1)


@linux_cpu
@with_shim
@pytest.mark.usefixtures("one_thread")
def test_products_are_nearly_as_fast_as_numpys() -> None:
    x, w = random(512, 1024), random(1024, 1024)
    mlx_x, mlx_w = mx.array(x), mx.array(w)
    mlx, numpy = best_times(lambda: mx.eval(mlx_x @ mlx_w), lambda: x @ w)
    assert numpy / mlx > 0.7, f"MLX took {mlx * 1e3:.2f} ms, NumPy {numpy * 1e3:.2f} ms"


@linux_cpu
@with_shim
@pytest.mark.usefixtures("one_thread")
def test_one_row_is_faster_than_eight() -> None:
    x, w = mx.array(random(8, 1024)), mx.array(random(1536, 1024)).T
    row = x[:1]
    one, eight = best_times(lambda: mx.eval(row @ w), lambda: mx.eval(x @ w))
    assert one < 0.6 * eight, f"one row took {one * 1e6:.0f} us, eight took {eight * 1e6:.0f} us"


@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("transpose_x", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 800, 1200), (2, 800, 1200), (3, 800, 1200), (4, 800, 1200), (5, 800, 1200), (37, 29, 53)],
)
def test_products_equal_numpys(
    rows: int, inner: int, columns: int, transpose_x: bool, transpose_w: bool
) -> None:
    x = random(inner, rows).T if transpose_x else random(rows, inner)
    w = random(columns, inner).T if transpose_w else random(inner, columns)
    mlx_x = mx.array(random(inner, rows)).T if transpose_x else mx.array(x)
    mlx_w = mx.array(random(columns, inner)).T if transpose_w else mx.array(w)
    np.testing.assert_allclose(np.array(mlx_x @ mlx_w), x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_scaled_sum_equals_numpys(rows: int) -> None:
    x, w, bias = random(rows, 800), random(1200, 800).T, random(rows, 1200)
    found = mx.addmm(mx.array(bias), mx.array(x), mx.array(w), alpha=0.5, beta=-2.0)
    np.testing.assert_allclose(np.array(found), 0.5 * (x @ w) - 2.0 * bias, rtol=1e-4, atol=1e-4)


def test_batches_equal_numpys() -> None:
    query, key = random(6, 4, 9, 32), random(6, 4, 11, 32)
    found = np.array(mx.array(query) @ mx.array(key).swapaxes(-1, -2))
    np.testing.assert_allclose(found, query @ key.swapaxes(-1, -2), rtol=1e-4, atol=1e-4)


@linux_cpu
@pytest.mark.parametrize("dtype", [np.float64, np.complex64])
def test_other_kinds_of_number_equal_numpys(dtype: Any) -> None:
    x, w = random(20, 30, dtype=dtype), random(30, 40, dtype=dtype)
    if dtype is np.complex64:
        x = x + 1j * random(20, 30)
    mlx_w = mx.array(w, dtype=getattr(mx, np.dtype(dtype).name))
    found = np.array(mx.array(x, dtype=mlx_w.dtype) @ mlx_w)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, x @ w, rtol=1e-4, atol=1e-4)


@linux_cpu
@with_shim
@pytest.mark.parametrize("rows", [1, 8])
def test_nan_in_fresh_memory_does_not_survive(rows: int) -> None:
    from localrl import _blas  # type: ignore[attr-defined]

    x, w, out = random(rows, 800), random(800, 1200), np.full((rows, 1200), np.nan, np.float32)
    real, pointer = ctypes.c_float, ctypes.POINTER(ctypes.c_float)
    a, b, c = (array.ctypes.data_as(pointer) for array in (x, w, out))
    ctypes.CDLL(_blas.__file__).cblas_sgemm(
        101, 111, 111, rows, 1200, 800, real(1), a, 800, b, 1200, real(0), c, 1200
    )
    np.testing.assert_allclose(out, x @ w, rtol=1e-4, atol=1e-4)


@linux_cpu
@with_shim
def test_numpys_openblas_is_found_and_used() -> None:
    found = report()
    assert found["blas"] == "numpy-openblas"
    assert found["right"]
    assert found["note"] is None
    assert 1 <= found["threads"] <= len(os.sched_getaffinity(0))


@linux_cpu
def test_mlx_imported_first_is_noticed() -> None:
    found = report("import mlx.core\n")
    assert found["blas"] == "reference"
    assert found["right"]
    assert "mlx was imported before localrl" in found["note"]


@linux_cpu
def test_without_shim_a_system_blas_serves_or_a_note_says_what_to_do() -> None:
    found = report(HIDE_SHIM)
    assert found["right"]
    if found["blas"] == "reference":
        assert "libopenblas0" in found["note"]
    else:
        assert found["blas"] in ("system-openblas", "mkl")
        assert found["note"] is None


@linux_cpu
def test_without_any_blas_one_line_names_the_mend() -> None:
    found = report(HIDE_SHIM + HIDE_SYSTEM_BLAS)
    assert found["blas"] == "reference"
    assert found["right"]
    assert "apt install gcc" in found["note"]
    assert "\n" not in found["note"]


@linux_cpu
@with_shim
def test_importing_the_shim_alone_changes_nothing() -> None:
    code = """
from localrl import _blas
import mlx.core as mx
mx.eval(mx.ones((4, 4)) @ mx.ones((4, 4)))
print(_blas.call_count())
"""
    assert run_child(code) == "0\n"


@with_shim
def test_shim_refuses_a_null_address() -> None:
    from localrl import _blas  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match="addresses other than 0"):
        _blas.publish(1, 1, 0, 1)


@linux_cpu
def test_users_thread_count_is_respected() -> None:
    assert report(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")["threads"] == 1


@linux_cpu
@with_shim
def test_threads_can_be_set_and_set_back() -> None:
    before = backend.describe().threads
    assert before is not None
    try:
        assert backend.set_threads(before + 1) == before + 1
        assert backend.describe().threads == before + 1
    finally:
        assert backend.set_threads(before) == before


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        backend.set_threads(0)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_containers_cpu_quota_is_read(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert backend._cpu_quota(tmp_path) == quota


@linux_cpu
def test_compiled_functions_run_no_compiler(tmp_path: Path) -> None:
    code = """
from localrl.backend import mx
print(mx.compile(lambda x: mx.exp(x) * x + 1)(mx.zeros((3, 5))).sum().item())
"""
    assert run_child(code, TMPDIR=str(tmp_path)) == "15.0\n"
    assert not list(tmp_path.rglob("*")), "MLX compiled something here"


@linux_cpu
@with_shim
def test_where_the_one_part_was_built_the_other_was_too() -> None:
    assert backend.kernels is not None


@linux_cpu
def test_install_without_a_compiler_works_and_names_the_mend(tmp_path: Path) -> None:
    # Not imported: that fails in a process that has looked for pip.
    if int(metadata.version("setuptools").split(".")[0]) < 77:  # pyproject.toml asks for it
        pytest.skip("an older setuptools")
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    env = {**os.environ, "CC": "/nonexistent/cc"}
    subprocess.run(
        [*pip, "--target", str(target), str(source)], env=env, check=True, timeout=DEADLINE_S
    )
    assert not list(target.glob("localrl/*.so"))

    # -S: an editable install of localrl beside it would lend its own compiled module.
    packages = str(Path(np.__file__).parents[1])
    path = os.pathsep.join((str(target), packages))
    found = report(HIDE_SYSTEM_BLAS, "-S", PYTHONPATH=path)
    assert found["right"]
    assert "apt install gcc" in found["note"]


def test_the_cpu_is_used_for_a_while_and_a_callers_device_stays(monkeypatch: Any) -> None:
    """With MLX's two devices, one of which this machine may not have."""
    cpu, gpu = SimpleNamespace(type="cpu"), SimpleNamespace(type="gpu")
    now, compiles = [gpu], []
    monkeypatch.setattr(
        backend,
        "mx",
        SimpleNamespace(
            cpu="cpu",
            Device=lambda kind: cpu,
            default_device=lambda: now[0],
            set_default_device=lambda device: now.__setitem__(0, device),
            disable_compile=lambda: compiles.append(False),
            enable_compile=lambda: compiles.append(True),
        ),
    )
    backend.compute_on_cpu(True)
    backend.compute_on_cpu(True)
    assert (now, compiles) == ([cpu], [False]), "a Mac may have no compiler for its CPU"
    backend.compute_on_cpu(False)
    assert (now, compiles) == ([gpu], [False, True])
    now[0] = cpu  # as the caller wants it
    backend.compute_on_cpu(False)
    assert now == [cpu]


VARIABLES = """
import json, os
from localrl.backend import mx
print(json.dumps([os.environ["MLX_ENABLE_TF32"], str(mx.default_device())]))
"""


@pytest.mark.parametrize(("given", "found"), [({}, "0"), ({"MLX_ENABLE_TF32": "1"}, "1")])
def test_float32_is_float32_unless_the_user_says_otherwise(
    given: dict[str, str], found: str, monkeypatch: Any
) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)  # this process has set it
    assert json.loads(run_child(VARIABLES, **given))[0] == found


def test_the_variable_is_set_before_mlx_is_loaded() -> None:
    """MLX reads it once."""
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core":
            print(os.environ.get("MLX_ENABLE_TF32"))
sys.meta_path.insert(0, Watch())
os.environ.pop("MLX_ENABLE_TF32", None)
import localrl.backend
"""
    assert run_child(code).split() == ["0"]


def test_the_environment_may_ask_for_the_cpu() -> None:
    assert json.loads(run_child(VARIABLES, LOCALRL_DEVICE="cpu"))[1] == str(mx.Device(mx.cpu))
    with pytest.raises(AssertionError, match="LOCALRL_DEVICE is 'gpu'; it must be auto or cpu"):
        run_child(VARIABLES, LOCALRL_DEVICE="gpu")
