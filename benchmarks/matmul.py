"""Measure MLX's float32 matrix products with and without the BLAS that localrl.backend lends.

Run `python benchmarks/matmul.py` on an idle Linux machine; it prints the tables of matmul.md. The
least time of many runs counts. Products and thread counts take turns, so that a slow spell of the
machine falls on all alike.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from localrl.backend import describe, mx, set_threads

LARGE = (512, 1024, 1024)
ROWS = (1, 2, 4, 8, 32, 128)
MATRICES = ((128, 128), (128, 512), (256, 256), (512, 512), (1024, 1024))
THREADS = (1, 2)
REFERENCE = """
import sys, time
import mlx.core as mx
x, w = mx.random.normal({x}), mx.random.normal({w})
mx.eval(x, w)
best = float("inf")
for _ in range({rounds}):
    start = time.perf_counter()
    mx.eval(x @ w)
    best = min(best, time.perf_counter() - start)
print(best)
"""

Shape = tuple[int, int, int]


def main() -> None:
    backend = describe()
    print(f"MLX's products go to: {backend.blas}. {backend.note or ''}\n")
    print_large()
    print_small()
    print_attention()


def print_large() -> None:
    """Compare MLX's own BLAS, the lent one and NumPy at one large product."""
    rows, inner, columns = LARGE
    x, w = random(rows, inner), random(inner, columns)
    mlx_x, mlx_w = mx.array(x), mx.array(w)
    print("| 512x1024 times 1024x1024 | threads | GFLOP/s |\n| --- | ---: | ---: |")
    own = reference_time((rows, inner), (inner, columns), rounds=5)
    print(f"| MLX, its own BLAS | 1 | {rate(LARGE, own):.1f} |")
    for threads in THREADS:
        set_threads(threads)
        lent, numpy = best_times([lambda: mx.eval(mlx_x @ mlx_w), lambda: x @ w], rounds=40)
        print(f"| MLX, lent BLAS | {threads} | {rate(LARGE, lent):.0f} |")
        print(f"| NumPy | {threads} | {rate(LARGE, numpy):.0f} |")
    print()


def print_small() -> None:
    """Time products of few rows, `x @ w` and `x @ w.T`, on one thread and on two."""
    print(
        "| rows | inner | columns | x @ w, 1 thread | 2 threads | x @ w.T, 1 thread | 2 threads |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for (inner, columns), rows in product(MATRICES, ROWS):
        cells = [f"{seconds * 1e6:.0f} us" for seconds in small_times(rows, inner, columns)]
        print(f"| {rows} | {inner} | {columns} | {' | '.join(cells)} |")
    print()


def small_times(rows: int, inner: int, columns: int) -> Iterator[float]:
    x = mx.array(random(rows, inner))
    for w in (mx.array(random(inner, columns)), mx.array(random(columns, inner)).T):
        best = dict.fromkeys(THREADS, float("inf"))
        for threads in THREADS * 3:
            set_threads(threads)
            # Many products in one graph, since starting an evaluation costs as much as one does.
            [seconds] = best_times([lambda w=w: mx.eval([x @ w for _ in range(20)])], 8, 20)
            best[threads] = min(best[threads], seconds)
        yield from best.values()


def print_attention() -> None:
    """Time the batched products of attention, which are many calls on tiny matrices."""
    print("| batched product | MLX's own BLAS | lent, 1 thread | 2 threads |")
    print("| --- | ---: | ---: | ---: |")
    for name, x_shape, w_shape in (
        ("decode scores, 128x4 of 1x32 times 32x64", (128, 4, 1, 32), (128, 4, 32, 64)),
        ("training scores, 32x4 of 72x32 times 32x72", (32, 4, 72, 32), (32, 4, 32, 72)),
    ):
        x, w = mx.array(random(*x_shape)), mx.array(random(*w_shape))
        cells = [reference_time(x_shape, w_shape, rounds=30)]
        for threads in THREADS:
            set_threads(threads)
            cells += best_times([lambda x=x, w=w: mx.eval(x @ w)], rounds=40)
        print(f"| {name} | {' | '.join(f'{seconds * 1e6:.0f} us' for seconds in cells)} |")


def reference_time(x: tuple[int, ...], w: tuple[int, ...], rounds: int) -> float:
    """Time a product in a process where nothing stands in front of MLX's own BLAS."""
    code = REFERENCE.format(x=x, w=w, rounds=rounds)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(child.stdout)


def best_times(functions: list[Callable[[], object]], rounds: int, repeat: int = 1) -> list[float]:
    """Return the least time of one of `repeat` products, for functions that are run in turn."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], (time.perf_counter() - start) / repeat)
    return best


def rate(shape: Shape, seconds: float) -> float:
    rows, inner, columns = shape
    return 2 * rows * inner * columns / seconds / 1e9


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


if __name__ == "__main__":
    main()
