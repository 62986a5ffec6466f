"""Every step in C beside NumPy, at the sizes of three models: how many times as fast it is.

    python benchmarks/kernels.py            writes benchmarks/kernels.json; two minutes on two cores
    python benchmarks/kernels.py --here     prints the ratios on this processor, as JSON
    python benchmarks/kernels.py --quick    the same, of fewer sizes

The first way measures each build beside the NumPy and BLAS that it would meet: the one for 64 bytes
with AVX-512, the one for 32 bytes with NumPy and OpenBLAS held to AVX2. Times are of the processor,
on one thread, the least of some tries: other programs hardly change them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from localrl import backend
from localrl.backend import kernels
from localrl.engines.cpu.attention import Attention
from localrl.engines.cpu.kernel_choice import NUMPY, Choice, KernelSizes, choose, using
from localrl.engines.cpu.math import FusedLinear, Norm, matmul, swiglu, swiglu_back
from localrl.engines.cpu.sampling import draw

MODELS = {
    "0.8M": {"width": 128, "ffn": 384, "heads": 4, "kv_heads": 2, "head_dim": 32},
    "7.3M": {"width": 256, "ffn": 768, "heads": 8, "kv_heads": 4, "head_dim": 32},
    "135M": {"width": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64},
}
VOCABULARY, RANK = 49152, 16
ROWS = (2, 4, 8, 16, 24, 32)
TRIES, LEAST_S = 7, 0.002

Work = Callable[[], Any]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def works(rows: tuple[int, ...] = ROWS) -> Iterator[tuple[str, Work]]:
    """Each step at each size, by name."""
    for name, sizes in MODELS.items():
        for n in rows:
            yield from ((f"{name} {step} {n}", work) for step, work in of_rows(n, **sizes))
        yield from ((f"{name} {step}", work) for step, work in of_prompts(**sizes))
    for n in rows:
        logits, uniforms = numbers(n, VOCABULARY), np.full(n, 0.5, np.float32)
        yield f"draw {n}", lambda a=logits, b=uniforms: draw(a, b, 0.7)


def of_rows(
    n: int, *, width: int, ffn: int, heads: int, kv_heads: int, head_dim: int
) -> Iterator[tuple[str, Work]]:
    """Steps of one token of n rows."""
    x, up = numbers(width, n), numbers(ffn, n)
    norm = Norm(numbers(width, 1), 1e-5)
    yield "norm", lambda: norm(x)
    yield "norm back", lambda: norm.back(x, x.copy())
    yield "gate", lambda: swiglu(up, up)
    yield "gate back", lambda: swiglu_back(up, up, up.copy())
    for name, shape in {"gate and up": (2 * ffn, width), "down": (width, ffn)}.items():
        weight, columns = numbers(*shape), numbers(shape[1], n)
        yield name, lambda a=weight, b=columns: matmul(a, b)
    weight, down, lora = numbers(2 * ffn, width), numbers(RANK, width), numbers(2 * ffn, RANK)
    layers = FusedLinear(weight, (slice(0, len(weight)),), None, down, lora)
    yield "adapted", lambda: layers(x)


def of_prompts(
    *, width: int, ffn: int, heads: int, kv_heads: int, head_dim: int
) -> Iterator[tuple[str, Work]]:
    """Attention over many positions: prompts, completions behind them, and a long text."""
    for rows, past, length in ((16, 0, 64), (32, 45, 24), (2, 0, 500)):
        shape = rows, kv_heads, heads // kv_heads, length, head_dim
        keys = numbers(rows, kv_heads, past + length, head_dim)
        valid = np.ones((rows, past), bool)
        attention = Attention(numbers(*shape), keys, keys, valid, head_dim**-0.5)
        found, grad = attention.forward().copy(), numbers(*shape)
        name = f"{rows} x {length} behind {past}"
        yield f"attention {name}", attention.forward
        yield f"attention back {name}", lambda a=attention, b=found, c=grad: a.back(b, c)


def least(work: Work, tries: int) -> float:
    """Processor seconds of one call, the least of some tries of a few milliseconds."""
    calls, best = 1, float("inf")
    work()
    for _ in range(tries):
        start = time.process_time()
        for _ in range(calls):
            work()
        took = (time.process_time() - start) / calls
        best = min(best, took)
        calls = max(1, min(1000, int(LEAST_S / max(took, 1e-7))))
    return best


def ratios(tries: int = TRIES, rows: tuple[int, ...] = ROWS) -> dict[str, float]:
    """How many times as fast as NumPy each step is, in turn with it, on one thread.

    Of each model the steps are those that a run of it would take.
    """
    threads = backend.describe().threads or 1
    backend.set_threads(1)
    choices = {name: chosen(sizes) for name, sizes in MODELS.items()}
    found = {}
    for name, work in works(rows):
        with using(NUMPY):
            plain = least(work, tries)
        with using(choices.get(name.split()[0], choices["135M"])):
            found[name] = plain / least(work, tries)
    backend.set_threads(threads)
    return found


def chosen(sizes: dict[str, int]) -> Choice:
    """What a run of this model takes: by timing, or what the environment says."""
    rest = {name: sizes[name] for name in ("ffn", "heads", "kv_heads", "head_dim")}
    return choose(KernelSizes(rows=2 * sizes["ffn"], inputs=sizes["width"], **rest))


def in_child(environment: dict[str, str], how: str = "--here") -> dict[str, float]:
    """The ratios in a process of its own, without this one's choice of BLAS kernels."""
    unset = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "LOCALRL_KERNELS", "NPY_DISABLE_CPU_FEATURES")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-W", "ignore", __file__, how]
    done = subprocess.run(
        command, env={**kept, **environment}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def as_avx2() -> dict[str, str]:
    """An environment in which a wider processor computes as one with AVX2 does, NumPy included."""
    from numpy._core._multiarray_umath import __cpu_dispatch__

    wider = [name for name in __cpu_dispatch__ if name.startswith(("AVX512", "X86_V4"))]
    return {
        "OPENBLAS_CORETYPE": "Haswell",
        "LOCALRL_KERNELS": "32",
        "NPY_DISABLE_CPU_FEATURES": " ".join(wider),
    }


def main() -> None:
    """Measure and write, or print."""
    if "--here" in sys.argv:
        print(json.dumps(ratios()))
        return
    if "--quick" in sys.argv:
        print(json.dumps(ratios(tries=4, rows=(2, 8, 32))))
        return
    assert kernels is not None, "built without a C compiler"
    builds = kernels.builds()
    found = {}
    if 64 in builds:
        found["64"] = in_child({})
        found["32"] = in_child(as_avx2())
    else:
        found[str(builds[-1])] = in_child({})
    report = {"processor": platform.processor() or platform.machine(), "ratios": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    for build, of_build in found.items():
        slowest = sorted(of_build.items(), key=lambda pair: pair[1])[:5]
        print(build, "bytes; least:", ", ".join(f"{name} {x:.2f}" for name, x in slowest))


if __name__ == "__main__":
    main()
