"""Memory and time of one Mamba 2 layer's gradient: over chunks, and in mlx-lm's pieces.

    python benchmarks/mamba.py > benchmarks/mamba.json

One row, 64 heads of 64 numbers with states of 128, as in Granite 4.0 H Micro, at the start of a row
and after a prompt, whose state it goes on from. Each measurement is a process of its own; memory is
MLX's peak above what is there before. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from localrl.backend import mx
from localrl.engines.mlx import mamba

LENGTHS = (256, 512, 1024)
HEADS, WIDTH, STATE = 64, 64, 128


def measure(kind: str, start: str, tokens: int) -> dict[str, Any]:
    """Peak bytes and seconds of one gradient of a sum."""
    from mlx_lm.models import ssm

    x = mx.random.normal((1, tokens, HEADS, WIDTH))
    b, c = (mx.random.normal((1, tokens, 1, STATE)) / STATE**0.5 for _ in "bc")
    dt = mx.random.normal((1, tokens, HEADS)) - 3
    a_log = mx.log(mx.random.uniform(1, 16, (HEADS,)))
    given = [x, b, c, dt]
    if start == "prompt":
        given.append(mx.random.normal((1, HEADS, WIDTH, STATE)))
    one, zero = mx.ones(HEADS), mx.zeros(HEADS)
    update = mamba.ssm_update if kind == "chunks" else ssm.ssm_update

    def total(
        x: mx.array, b: mx.array, c: mx.array, dt: mx.array, state: mx.array | None = None
    ) -> mx.array:
        return update(x, a_log, b, c, one, dt, zero, state)[0].sum()

    mx.eval(given, a_log, one, zero)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    begun = time.perf_counter()
    mx.eval(mx.grad(total, argnums=range(len(given)))(*given))
    return {
        "kind": kind,
        "start": start,
        "tokens": tokens,
        "peak_bytes": mx.get_peak_memory() - before,
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    """Measure both at every length, in turn."""
    found = []
    for start in ("row", "prompt"):
        for tokens in LENGTHS:
            for kind in ("chunks", "pieces"):
                command = [sys.executable, __file__, kind, start, str(tokens)]
                told = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(json.loads(told.stdout))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main()
