"""The package's single entry to MLX: prepares the process, imports MLX, reports its backend.

Every other module writes `from localrl.backend import mx, nn, optim`. On a Mac that is the plain
import. On Linux, MLX's own wheel multiplies matrices with the reference BLAS, some seventy times
slower than the OpenBLAS in NumPy's wheel. Therefore a fast BLAS is made to provide the symbols
that MLX imports (`cblas_sgemm` and its kin) before MLX is loaded. The choice, best first:

1. NumPy's OpenBLAS, through the compiled module `localrl._blas`;
2. an OpenBLAS or MKL installed on the system, which exports the plain names itself;
3. the reference BLAS, with a note that says how to fix it.

Two variables of the environment count: `LOCALRL_DEVICE=cpu` makes the whole process, and those that
it starts, compute on MLX's CPU device, for tests on a machine whose GPU must not be used. And
`MLX_ENABLE_TF32` is set to 0 unless the user has set it, see below.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

__all__ = [
    "Backend",
    "compute_on_cpu",
    "describe",
    "kernels",
    "mx",
    "nn",
    "optim",
    "set_threads",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]

Device = Literal["metal", "cpu", "cuda"]
Blas = Literal["numpy-openblas", "system-openblas", "mkl", "accelerate", "reference"]

# More threads than this cost more to wake up than they save on matrices of at most a few
# thousand rows and columns, and each idle one spins for a while after every product.
_MOST_THREADS = 8
_THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
)
_SYSTEM_LIBRARIES = (
    "libopenblasp.so.0",  # Fedora's threaded build; its plain name is the serial one
    "libopenblas.so.0",
    "libmkl_rt.so.3",
    "libmkl_rt.so.2",
)
_SLOW = "matrix products run on the reference BLAS, some seventy times slower than OpenBLAS"


@dataclass(frozen=True)
class Backend:
    """The device and BLAS that MLX uses in this process.

    `blas` and `threads` are None on a GPU; `threads` is also None where Accelerate decides.
    `note` is one line that says what is slow and how to fix it, or None if nothing is.
    """

    device: Device
    blas: Blas | None
    threads: int | None
    note: str | None


@dataclass(frozen=True)
class _Library:
    """A BLAS that computes MLX's matrix products.

    `count_calls`, if available, returns how many products it has received.
    """

    name: Blas
    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]
    count_calls: Callable[[], int] | None = None


class _UnavailableError(Exception):
    """A BLAS is unavailable; the message says why and how to fix it."""


def describe() -> Backend:
    """Return MLX's current device and BLAS, checked with one tiny product where possible."""
    device = _device()
    if device != "cpu":
        return Backend(device, None, None, None)
    if sys.platform == "darwin":
        return Backend(device, "accelerate", None, None)
    if _library is None:
        return Backend(device, "reference", 1, _note)
    if not _is_reached():
        note = f"{_SLOW}: another library provides cblas_sgemm; import localrl.backend first"
        return Backend(device, "reference", 1, note)
    return Backend(device, _library.name, _library.get_threads(), None)


def set_threads(n: int) -> int:
    """Set how many threads a matrix product may use, and return the number in force.

    NumPy shares the setting if its OpenBLAS is in use. Where the number cannot be set (on a
    GPU, with Accelerate, with the reference BLAS) nothing changes and 1 is returned.
    """
    if n < 1:
        raise ValueError(f"the number of threads must be at least 1, not {n}")
    if _library is None:
        return 1
    _library.set_threads(n)
    return _library.get_threads()


def compute_on_cpu(wanted: bool) -> None:
    """Let MLX compute on the CPU, or again on the device from which this function switched it.

    A device that the caller has set stays. Arrays and streams that were made before stay where
    they are, so call it before anything is computed.
    """
    global _switched_from
    if wanted and mx.default_device().type != mx.cpu:
        _switched_from = mx.default_device()
        mx.set_default_device(mx.Device(mx.cpu))
        mx.disable_compile()
    elif not wanted and _switched_from is not None:
        mx.set_default_device(_switched_from)
        mx.enable_compile()
        _switched_from = None


def _device() -> Device:
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@functools.cache
def _is_reached() -> bool:
    """Check that MLX's products reach the library prepared for them."""
    if _library is None or _library.count_calls is None:
        return _library is not None
    before = _library.count_calls()
    ones = mx.ones((2, 2))
    mx.eval(mx.matmul(ones, ones, stream=mx.Device(mx.cpu)))
    return _library.count_calls() > before


def _prepare() -> tuple[_Library | None, str | None]:
    """Put a fast BLAS in front of MLX's own; return it, or a note that says why there is none."""
    if sys.platform != "linux":
        return None, None
    if "mlx.core" in sys.modules:
        return None, f"{_SLOW}: mlx was imported before localrl; import localrl.backend first"
    library, reason = _choose()
    if library is None:
        return None, f"{_SLOW}: {reason}, or `apt install libopenblas0-pthread`"
    if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        library.set_threads(min(_usable_cpus(), _MOST_THREADS))
    return library, None


def _choose() -> tuple[_Library | None, str | None]:
    """Return the best available BLAS, or None and the reason NumPy's is unavailable."""
    preloaded = _load_for_everyone(None)
    if preloaded is not None:
        return preloaded, None
    try:
        return _borrow_from_numpy(), None
    except _UnavailableError as error:
        return _load_from_system(), str(error)


def _borrow_from_numpy() -> _Library:
    """Make `localrl._blas` forward MLX's products to the OpenBLAS in NumPy's wheel."""
    openblas = _numpy_openblas()
    names = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cblas_sgemv")
    try:
        sgemm, dgemm, cgemm, sgemv = (_address(openblas, f"scipy_{name}64_") for name in names)
        shim = _import_shim()
        get = openblas.scipy_openblas_get_num_threads64_
        set_ = openblas.scipy_openblas_set_num_threads64_
        if kernels is not None:
            sgemm, sgemv = kernels.lend(sgemm, sgemv)
            get, set_ = _one_team(kernels, get(), set_)
        shim.publish(sgemm, dgemm, cgemm, sgemv)
    except (AttributeError, OSError) as error:
        raise _UnavailableError(
            f"NumPy's OpenBLAS cannot be used ({error}); `pip install --upgrade numpy`"
        ) from error
    return _Library("numpy-openblas", get, set_, shim.call_count)


def _one_team(
    team: ModuleType, threads: int, set_blas_threads: Callable[[int], None]
) -> tuple[Callable[[], int], Callable[[int], None]]:
    """Give all threads to the thread team of the C kernels, and one to each BLAS call.

    Returns: functions that get and set the number of threads.
    """
    set_blas_threads(1)
    in_force = team.set_threads(threads)

    def set_threads(n: int) -> None:
        nonlocal in_force
        in_force = team.set_threads(n)

    return lambda: in_force, set_threads


def _numpy_openblas() -> ctypes.CDLL:
    spec = importlib.util.find_spec("numpy")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent.parent / "numpy.libs"
        for path in folder.glob("libscipy_openblas64_*.so*"):
            return ctypes.CDLL(str(path))
    raise _UnavailableError(
        "the installed NumPy has no OpenBLAS of its own; `pip install --force-reinstall numpy`"
    )


def _import_shim() -> ModuleType:
    # Import only once the addresses are known: if extension modules are loaded with global symbols
    # (sys.setdlopenflags), an unbound shim would receive MLX's products.
    try:
        return importlib.import_module("localrl._blas")
    except ImportError as error:
        raise _UnavailableError(
            "localrl was installed without a C compiler; `apt install gcc python3-dev && "
            "pip install --force-reinstall --no-deps --no-cache-dir localrl`"
        ) from error


def _load_from_system() -> _Library | None:
    core = _core_type()
    if core is not None:
        # An older OpenBLAS treats a newer processor as a 2004 Prescott, at a fifth of the speed.
        os.environ.setdefault("OPENBLAS_CORETYPE", core)
    folder = Path(sys.prefix, "lib")  # conda and pip's MKL keep theirs here
    places = [place for name in _SYSTEM_LIBRARIES for place in (name, str(folder / name))]
    return next(filter(None, map(_load_for_everyone, places)), None)


def _load_for_everyone(place: str | None) -> _Library | None:
    """Make the BLAS at `place` global for libraries loaded later (None: what is global already).

    Returns None if no such file exists, if it does not use 32-bit integers, or if another
    library would still take precedence.
    """
    try:
        blas = ctypes.CDLL(place)
        library = _plain_library(blas)
        if library is not None:
            ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
            if _address(ctypes.CDLL(None), "cblas_sgemm") == _address(blas, "cblas_sgemm"):
                return library
    except (AttributeError, OSError):
        pass
    return None


def _plain_library(blas: ctypes.CDLL) -> _Library | None:
    if hasattr(blas, "openblas_get_config"):
        blas.openblas_get_config.restype = ctypes.c_char_p
        if b"USE64BITINT" in blas.openblas_get_config():
            return None
        get_threads, set_threads = blas.openblas_get_num_threads, blas.openblas_set_num_threads
        return _Library("system-openblas", get_threads, set_threads)
    if "ILP64" in os.environ.get("MKL_INTERFACE_LAYER", ""):
        return None
    return _Library("mkl", blas.MKL_Get_Max_Threads, blas.MKL_Set_Num_Threads)


def _core_type() -> str | None:
    """Name the x86-64 OpenBLAS kernels that this processor can run; None if unsure."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    if flags >= {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}:
        return "SkylakeX"
    return "Haswell" if flags >= {"avx2", "fma"} else None


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _usable_cpus() -> int:
    """Count the CPUs this process may keep busy: its affinity, within its container's quota."""
    allowed = len(os.sched_getaffinity(0))
    quota = _cpu_quota(Path("/sys/fs/cgroup"))
    # A quota of 1.5 is rounded down: two busy threads would be throttled in every period.
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    """Return the CPU time a control group grants, in CPUs; None if it sets no limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
            if int(quota) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):  # no such file, or the quota is "max"
            continue
    return None


def _device_wanted() -> str:
    """Read `LOCALRL_DEVICE`: "auto" or "cpu"."""
    wanted = os.environ.get("LOCALRL_DEVICE") or "auto"
    if wanted not in ("auto", "cpu"):
        raise ValueError(f"LOCALRL_DEVICE is {wanted!r}; it must be auto or cpu")
    return wanted


def _find_kernels() -> ModuleType | None:
    """Import `localrl._kernels`; None if it was not built, off Linux, or after MLX was loaded."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    try:
        return importlib.import_module("localrl._kernels")
    except ImportError:
        return None


kernels: ModuleType | None = _find_kernels()
"""Model kernels in C, for Linux CPUs, and the thread team they share with matrix products."""
_library, _note = _prepare()
if _library is None or _library.name != "numpy-openblas":
    kernels = None

# By default MLX multiplies float32 matrices in TF32 where the GPU can (M5 under macOS 26.2, CUDA),
# with 10 bits of mantissa: relative errors near 1e-3 per product, far above what float32 promises
# to the checks at the start of a run. Models with 16-bit weights are not affected.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx  # noqa: E402  (the BLAS and the variable must be in place first)

_switched_from: mx.Device | None = None
if _device_wanted() == "cpu":
    mx.set_default_device(mx.Device(mx.cpu))
if mx.default_device().type == mx.cpu:
    # On the CPU, mx.compile runs a C++ compiler for each new graph, which costs up to a minute at
    # the start of a run and saves less than that; a Mac may have none.
    mx.disable_compile()

import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402
