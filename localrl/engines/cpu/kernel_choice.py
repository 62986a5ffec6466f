"""Selection of the C kernels for a model on this processor, by timing instead of CPU flags.

There are builds for SIMD widths of 16, 32 and 64 bytes, and NumPy alone. At a model's own sizes
each build that the processor can run is timed against NumPy. The choice is stored in the user's
cache, so that the next run of the same model computes the same bits, and in the state of a run,
which resumes with it. `LOCALRL_KERNELS` sets it by hand: 16, 32, 64 or numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from localrl.backend import describe, kernels
from localrl.errors import ConfigError
from localrl.utils import stored
from localrl.utils.cache import cache_folder

VARIABLE = "LOCALRL_KERNELS"
COLUMNS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of columns at which products are timed; those between behave alike."""
TRIES, TRY_S = 5, 3e-4
MARGIN = 1.1
"""Factor by which a wider build may seem slower: timings are noisy, the choice should not be."""
FORMAT = 5
"""Version of the stored choices; increase it when the kernels change, as old timings are void."""


@dataclass(frozen=True)
class Choice:
    """A build of the C kernels, and the products it is used for."""

    bytes: int
    """SIMD width in bytes; 0: NumPy computes everything."""
    columns: tuple[int, ...]
    """Entries c of `COLUMNS` for which products of c/2 < n <= c columns are not left to BLAS."""
    gains: dict[str, float] = field(default_factory=dict)
    """Measured speed relative to NumPy alone, by operation; empty if set by hand."""

    def __str__(self) -> str:
        if not self.bytes:
            return "NumPy alone"
        told = ", ".join(f"{name} {gain:.1f}" for name, gain in self.gains.items())
        beside = f"; speed relative to NumPy: {told}" if told else ""
        return (
            f"C kernels for vectors of {self.bytes} bytes, products of up to "
            f"{max(self.columns, default=0)} columns{beside}"
        )

    @property
    def bits(self) -> int:
        """The columns as a bit set, as `kernels.use` takes them."""
        return sum(columns for columns in self.columns)  # powers of two: a bit each

    def takes(self, n: int) -> bool:
        """Return True if products of n columns are not left to the BLAS."""
        return 1 << (n - 1).bit_length() in self.columns


NUMPY = Choice(0, ())
Work = Callable[[], object]


@dataclass(frozen=True)
class KernelSizes:
    """The sizes of a model that the kernels depend on."""

    rows: int
    """Number of rows of its largest matrix between layers."""
    inputs: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int


_choice = NUMPY
_steps: ModuleType | None = None


def steps() -> ModuleType | None:
    """Return the C kernels if they are in use."""
    return _steps


def current() -> Choice:
    """Return the choice in use."""
    return _choice


def use(choice: Choice) -> None:
    """Use this choice from now on.

    Raises: ConfigError if this processor cannot run that build.
    """
    global _choice, _steps
    if choice.bytes:
        if kernels is None or choice.bytes not in kernels.builds():
            raise ConfigError(
                f"This machine cannot run the C kernels for vectors of {choice.bytes} bytes; it "
                f"supports {kernels.builds() if kernels else 'none'}."
            )
        kernels.use(choice.bytes, choice.bits)
    elif kernels is not None:
        kernels.use(kernels.builds()[0], 0)
    _choice, _steps = choice, kernels if choice.bytes else None


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Use this choice within a context."""
    before = _choice
    use(choice)
    try:
        yield
    finally:
        use(before)


def default() -> Choice:
    """Return the choice from the environment, or the widest build until anything is timed.

    Raises: ConfigError if the environment names a build that this processor cannot run.
    """
    wish = os.environ.get(VARIABLE, "")
    if kernels is None or wish == "numpy":
        return NUMPY
    builds: list[int] = kernels.builds()
    if not wish:
        return Choice(builds[-1], COLUMNS)
    if wish not in map(str, builds):
        known = "".join(f" or {width}" for width in builds)
        raise ConfigError(f"{VARIABLE} is {wish!r}; here it may be numpy{known}, or unset.")
    return Choice(int(wish), COLUMNS)


def choose(sizes: KernelSizes) -> Choice:
    """Use the fastest choice for a model of these sizes: set by hand, stored, or timed now."""
    if kernels is None or os.environ.get(VARIABLE):
        found = default()
    else:
        found = _recall(sizes) or _measure(sizes, kernels)
    use(found)
    return found


def _measure(sizes: KernelSizes, module: ModuleType) -> Choice:
    """Time all builds alternately with NumPy and store the result; takes tenths of a second."""
    with using(_choice):
        builds = module.builds()
        ways = [NUMPY, *(Choice(width, COLUMNS) for width in builds)]
        products = [_in_turn(ways, _product(sizes, module, n)) for n in COLUMNS]
        others = {name: _in_turn(ways, work) for name, work in _others(sizes).items()}
    timed = {
        width: (
            [of_columns[place] for of_columns in products],
            {name: seconds[place] for name, seconds in others.items()},
        )
        for place, width in enumerate([0, *builds])
    }
    blas, plain = timed.pop(0)
    choice = _fastest(blas, plain, timed)
    _remember(sizes, choice)
    return choice


def _fastest(
    blas: list[float],
    plain: dict[str, float],
    timed: dict[int, tuple[list[float], dict[str, float]]],
) -> Choice:
    """Return the widest build that neither a narrower one nor NumPy beats by the margin."""
    best, least = NUMPY, sum(blas) + sum(plain.values())
    for width, (mine, others) in timed.items():  # ascending
        taken = [min(one, two) for one, two in zip(mine, blas, strict=True)]
        total = sum(taken) + sum(others.values())
        if total < least * (MARGIN if best.bytes else 1):
            faster = [i for i in range(len(COLUMNS)) if mine[i] < blas[i]]
            columns = tuple(COLUMNS[i] for i in faster)
            gains = {
                f"{COLUMNS[i]} column{'s' * (COLUMNS[i] > 1)}": blas[i] / mine[i] for i in faster
            }
            gains |= {name: plain[name] / others[name] for name in plain}
            best = Choice(width, columns, gains)
            least = min(least, total)
    return best


def _product(sizes: KernelSizes, module: ModuleType, n: int) -> Work:
    """Work of one product of n columns."""
    weight, x, out = _ones(sizes.rows, sizes.inputs), _ones(sizes.inputs, n), _ones(sizes.rows, n)
    return lambda: module.matmul(weight, x, out, False, False)


def _others(sizes: KernelSizes) -> dict[str, Work]:
    """Work of attention over a short prompt, and of a gate."""
    from localrl.engines.cpu.attention import Attention  # which imports this module
    from localrl.engines.cpu.math import swiglu

    each, length = sizes.heads // sizes.kv_heads, 64
    shape = (2, sizes.kv_heads, each, length, sizes.head_dim)
    keys = _ones(2, sizes.kv_heads, length, sizes.head_dim)
    attention = Attention(_ones(*shape), keys, keys, np.ones((2, 0), bool), sizes.head_dim**-0.5)
    gate = _ones(sizes.ffn, 32)
    return {"attention": attention.forward, "gate": lambda: swiglu(gate, gate)}


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _in_turn(ways: Sequence[Choice], work: Work) -> list[float]:
    """Seconds of the work with each choice, the best of a few tries, each long enough to time."""
    least, calls = [math.inf] * len(ways), 1
    for _ in range(TRIES + 1):
        for place, way in enumerate(ways):
            use(way)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            least[place] = min(least[place], (time.perf_counter() - start) / calls)
        calls = max(1, int(TRY_S / min(least)))
    return least


def _key(sizes: KernelSizes) -> str:
    """Cache key of a choice: the processor, NumPy and its BLAS, threads, the model's sizes."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    blas = os.environ.get("OPENBLAS_CORETYPE")
    parts = [FORMAT, processor, np.__version__, blas, describe().threads, asdict(sizes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def store() -> Path:
    """Path of the file of choices, in localrl's cache folder."""
    return cache_folder() / "kernels.json"


def _recall(sizes: KernelSizes) -> Choice | None:
    found = stored.recall(store(), _key(sizes))
    if found is None:
        return None
    try:
        choice = Choice(found["bytes"], tuple(found["columns"]), dict(found["gains"]))
        known = choice.bytes == 0 or (kernels is not None and choice.bytes in kernels.builds())
        return choice if known and set(choice.columns) <= set(COLUMNS) else None
    except (ValueError, KeyError, TypeError):
        return None


def _remember(sizes: KernelSizes, choice: Choice) -> None:
    """Store the choice; if that fails, the next run times again."""
    stored.remember(store(), _key(sizes), asdict(choice))


with suppress(ConfigError):  # reported when a model is opened
    use(default())
