"""Which steps in C compute a model on this processor: chosen by timing, not by its flags.

There are builds for vectors of 16, 32 and 64 bytes, and NumPy alone. At a model's own sizes each
build that the processor can run is timed beside NumPy. The choice is kept in the user's cache, so
that the next run of the same model computes the same bits, and in the state of a run, which goes on
with it. `LOCALRL_KERNELS` sets it by hand: 16, 32, 64 or numpy.
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
from localrl.utils.cache import cache_folder

VARIABLE = "LOCALRL_KERNELS"
COLUMNS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Columns at which products are timed; those between are like them."""
TRIES, TRY_S = 5, 3e-4
MARGIN = 1.1
"""How much slower a wider build may seem: clocks waver, and a choice should not."""
FORMAT = 5
"""Of the stored choices: one more when the steps change, since timings of others mean nothing."""


@dataclass(frozen=True)
class Choice:
    """A build of the steps in C, and what its products are used for."""

    bytes: int
    """Of a vector; 0: NumPy computes everything."""
    columns: tuple[int, ...]
    """Of `COLUMNS`: up to so many, and more than half of it, are not left to the BLAS."""
    gains: dict[str, float] = field(default_factory=dict)
    """How many times as fast as NumPy alone it was, by what was timed; empty when set by hand."""

    def __str__(self) -> str:
        if not self.bytes:
            return "NumPy alone"
        told = ", ".join(f"{name} {gain:.1f}" for name, gain in self.gains.items())
        beside = f"; times as fast as NumPy: {told}" if told else ""
        return (
            f"steps in C for vectors of {self.bytes} bytes, products of up to "
            f"{max(self.columns, default=0)} columns{beside}"
        )

    @property
    def bits(self) -> int:
        """The columns, as `kernels.use` takes them."""
        return sum(columns for columns in self.columns)  # powers of two: a bit each

    def takes(self, n: int) -> bool:
        """Whether products of n columns are not left to the BLAS."""
        return 1 << (n - 1).bit_length() in self.columns


NUMPY = Choice(0, ())
Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What a model asks of the steps."""

    rows: int
    """Of its largest matrix between layers."""
    inputs: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int


_choice = NUMPY
_steps: ModuleType | None = None


def steps() -> ModuleType | None:
    """The steps in C, where they are in use."""
    return _steps


def current() -> Choice:
    """What is in use."""
    return _choice


def use(choice: Choice) -> None:
    """Compute with this from now on.

    Raises: ConfigError when this processor cannot run that build.
    """
    global _choice, _steps
    if choice.bytes:
        if kernels is None or choice.bytes not in kernels.builds():
            raise ConfigError(
                f"This machine cannot run the steps in C for vectors of {choice.bytes} bytes; it "
                f"has {kernels.builds() if kernels else 'none'}."
            )
        kernels.use(choice.bytes, choice.bits)
    elif kernels is not None:
        kernels.use(kernels.builds()[0], 0)
    _choice, _steps = choice, kernels if choice.bytes else None


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Compute with this for a while."""
    before = _choice
    use(choice)
    try:
        yield
    finally:
        use(before)


def default() -> Choice:
    """The widest build, before anything is timed; or what the environment says.

    Raises: ConfigError when that names a build that this processor cannot run.
    """
    wish = os.environ.get(VARIABLE, "")
    if kernels is None or wish == "numpy":
        return NUMPY
    builds: list[int] = kernels.builds()
    if not wish:
        return Choice(builds[-1], COLUMNS)
    if wish not in map(str, builds):
        known = "".join(f" or {width}" for width in builds)
        raise ConfigError(f"{VARIABLE} is {wish!r}; here it may be numpy{known}, or be left out.")
    return Choice(int(wish), COLUMNS)


def choose(sizes: Sizes) -> Choice:
    """Take the fastest for a model of these sizes: as set, as stored, or as timed now."""
    if kernels is None or os.environ.get(VARIABLE):
        found = default()
    else:
        found = _recall(sizes) or _measure(sizes, kernels)
    use(found)
    return found


def _measure(sizes: Sizes, module: ModuleType) -> Choice:
    """Time all builds in turn with NumPy, and keep the outcome; some tenths of a second."""
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
    """The widest build that no narrower one, nor NumPy, beats by the margin."""
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


def _product(sizes: Sizes, module: ModuleType, n: int) -> Work:
    """One product of n columns."""
    weight, x, out = _ones(sizes.rows, sizes.inputs), _ones(sizes.inputs, n), _ones(sizes.rows, n)
    return lambda: module.matmul(weight, x, out, False, False)


def _others(sizes: Sizes) -> dict[str, Work]:
    """Attention over a short prompt, and a gate."""
    from localrl.engines.cpu.attention import Attention  # which asks this module
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
    """Seconds of the work each way, the least of a few tries, each long enough for a clock."""
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


def _key(sizes: Sizes) -> str:
    """What a choice holds for: the processor, NumPy and its BLAS, threads, the model's sizes."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    blas = os.environ.get("OPENBLAS_CORETYPE")
    parts = [FORMAT, processor, np.__version__, blas, describe().threads, asdict(sizes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def store() -> Path:
    """The file of choices, in localrl's cache."""
    return cache_folder() / "kernels.json"


def _recall(sizes: Sizes) -> Choice | None:
    try:
        found = json.loads(store().read_bytes())[_key(sizes)]
        choice = Choice(found["bytes"], tuple(found["columns"]), dict(found["gains"]))
        known = choice.bytes == 0 or (kernels is not None and choice.bytes in kernels.builds())
        return choice if known and set(choice.columns) <= set(COLUMNS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(sizes: Sizes, choice: Choice) -> None:
    """Keep it; where that cannot be, the next run times again."""
    path = store()
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps({**known, _key(sizes): asdict(choice)}, indent=1))
        beside.replace(path)
    except OSError:
        pass


with suppress(ConfigError):  # told when a model is opened
    use(default())
