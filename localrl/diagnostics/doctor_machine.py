"""The rows of `localrl doctor` about memory, speed of products, and mismatched versions.

Times are the best of a few short repeats; a machine that is busy with other work appears slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from localrl import backend
from localrl.backend import mx
from localrl.embedded import embedded_model_path
from localrl.engines.open import make_policy
from localrl.errors import LocalRLError
from localrl.memory.limit import memory_limit, show
from localrl.memory.machine import Machine
from localrl.policy.model import Policy, load_model
from localrl.rollouts.decode import Decoder

Status = Literal["ok", "warn", "fail"]

SAME_VERSION = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
"""The libraries that mlx loads, one for each kind of machine. An installed one must have mlx's own
version: between versions functions are missing, or take other arguments."""

MUCH_SWAP = 0.25
"""Share of the total memory in swap above which the memory of other programs will slow a run down;
macOS swaps a little even when all is well."""
LITTLE_BYTES = 500_000_000
"""Limit in bytes below which only a tiny model can be trained."""

PRODUCTS = (128, 256, 384)
"""Sizes of the square matrices multiplied; larger ones would take the reference BLAS long."""
PRODUCT_REPEATS = 4
SLOW = 2.0
"""Ratio of MLX's time to NumPy's above which something is wrong."""

DECODE_ROWS = (1, 16)
DECODE_TOKENS, WARM_TOKENS = 32, 4
DECODE_PROMPT = (1, 2, 3, 4)


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    id: str
    """Stable from version to version."""
    status: Status
    text: str
    """One-line description of the finding."""
    todo: str | None = None
    """Remedy for the finding."""


def pair_rows(versions: Mapping[str, str | None]) -> Iterator[CheckResult]:
    """Check that packages that belong together have the same version; `versions` as installed.

    A package that is not installed has no row: mlx has a library for each kind of machine.
    """
    mlx = versions.get("mlx")
    for name in SAME_VERSION:
        found = versions.get(name)
        if found is None or mlx is None:
            continue
        both = f"mlx {mlx} and {name} {found}"
        if found == mlx:
            yield CheckResult(f"pair.{name}", "ok", both)
        else:
            mend = f"pip install --force-reinstall --no-deps '{name}=={mlx}'"
            yield CheckResult(f"pair.{name}", "fail", f"{both} must have the same version", mend)


def memory_rows(machine: Machine) -> Iterator[CheckResult]:
    """Report the machine's memory, and the limit that MLX would get."""
    yield _memory(machine)
    limit = memory_limit(None, machine, mx.get_active_memory() + mx.get_cache_memory())
    if limit.bytes is None:
        mend = "set one with --memory-limit, as in --memory-limit 6GB"
        yield CheckResult("memory.limit", "warn", f"no limit is applied: {limit.reason}", mend)
        return
    own = machine.resident_bytes
    beside = f"; this process holds {show(own)} now" if own is not None else ""
    text = f"MLX may hold {show(limit.bytes)}: {limit.reason}{beside}"
    little = limit.bytes < LITTLE_BYTES
    mend = "close other programs, or set --memory-limit" if little else None
    yield CheckResult("memory.limit", "warn" if little else "ok", text, mend)


def blas_speed_row(device: str) -> CheckResult | None:
    """Compare MLX's matrix products with NumPy's on the same matrices, in less than 0.3 s.

    None on a GPU, where small products measure the transfer, and NumPy is no yardstick.
    """
    if device != "cpu":
        return None
    return speed_row(*_product_times())


def speed_row(mlx_s: float, numpy_s: float) -> CheckResult:
    """Check that MLX's products take about as long as NumPy's; times in seconds."""
    work = sum(2 * size**3 for size in PRODUCTS)
    text = (
        f"matrix products: MLX {work / mlx_s / 1e9:.1f}, NumPy {work / numpy_s / 1e9:.1f} GFLOP/s"
    )
    if mlx_s <= SLOW * numpy_s:
        return CheckResult("blas.speed", "ok", text)
    mend = "see the row blas; if it is ok, run doctor again when nothing else is running"
    return CheckResult(
        "blas.speed", "warn", f"{text}: MLX takes {mlx_s / numpy_s:.1f} times as long", mend
    )


def decode_speed_row() -> CheckResult:
    """Measure how fast the embedded model decodes, as a number to compare machines and versions."""
    try:
        policy = _embedded_policy()
    except LocalRLError as error:
        return CheckResult("decode.speed", "warn", str(error), "reinstall localrl")
    _decode_rate(policy, max(DECODE_ROWS), WARM_TOKENS)
    rates = [
        f"{_decode_rate(policy, rows, DECODE_TOKENS):.0f} tokens/s at {rows} row"
        + ("s" if rows > 1 else "")
        for rows in DECODE_ROWS
    ]
    return CheckResult("decode.speed", "ok", f"embedded model: {', '.join(rates)}")


def _memory(machine: Machine) -> CheckResult:
    total, swap = machine.total_bytes, machine.swap_used_bytes
    parts = [
        f"{_known(total)} in all, {_known(machine.available_bytes)} available",
        f"swap used {_known(swap)}",
        f"pressure {machine.pressure or 'unknown'}",
    ]
    if machine.container_limit_bytes is not None:
        left = _known(machine.container_bytes)
        parts.insert(1, f"container {show(machine.container_limit_bytes)}, {left} left")
    swapped = swap is not None and total is not None and swap > MUCH_SWAP * total
    tight = machine.pressure in ("warn", "critical")
    mend = "close other programs, or wait: a run that swaps is many times slower"
    bad = tight or swapped
    return CheckResult("memory", "warn" if bad else "ok", ", ".join(parts), mend if bad else None)


def _known(size: int | None) -> str:
    return "unknown" if size is None else show(size)


def _product_times() -> tuple[float, float]:
    """Return the seconds that MLX and NumPy take for all products, each at its best, in turns."""
    draws, times = np.random.default_rng(0), [0.0, 0.0]
    for size in PRODUCTS:
        host = draws.standard_normal((size, size)).astype(np.float32)
        array = mx.array(host)
        ways: tuple[Callable[[], object], ...] = (
            lambda array=array: mx.eval(array @ array),
            lambda host=host: host @ host,
        )
        best = [float("inf"), float("inf")]
        for _ in range(PRODUCT_REPEATS):
            for i, way in enumerate(ways):
                best[i] = min(best[i], _seconds(way))
        times = [total + one for total, one in zip(times, best, strict=True)]
    return times[0], times[1]


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _embedded_policy() -> Policy:
    """Load the embedded model as in a run: dense and in float32 on the CPU."""
    on_cpu = backend.describe().device == "cpu"
    loaded = load_model(embedded_model_path())
    return make_policy(loaded, rank=1, scale=1.0, seed=0, for_cpu=on_cpu, dense=on_cpu)


def _decode_rate(policy: Policy, rows: int, tokens: int) -> float:
    """Return the tokens per second of this many rows together; all rows decode to the end."""
    decoder = Decoder(policy, 1.0, rows)
    state = decoder.prefill([DECODE_PROMPT]).fork(np.zeros(rows, int), None)
    coins = np.random.default_rng(0).random((tokens, rows), np.float32)
    start = time.perf_counter()
    for step in range(tokens):
        state.step(state.sample(coins[step], 1.0).tokens)
    state.wait()
    return rows * tokens / (time.perf_counter() - start)
