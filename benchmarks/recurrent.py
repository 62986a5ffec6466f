"""Memory and time of one recurrent layer's gradient: over chunks, and as mlx-lm computes it.

    python benchmarks/recurrent.py > benchmarks/recurrent.json

One row. A gated delta net with 16 heads of keys and 32 of values, 128 numbers each, as in
Qwen3.5-9B; Mamba 2 with 48 heads of 64 numbers and a state of 128, going on from a state, as a
level of a forest does. Each measurement is a process of its own; memory is MLX's peak above what is
there before. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from localrl.backend import mx
from localrl.engines.mlx.gated_delta import gated_delta
from localrl.engines.mlx.mamba import ssm_update

LENGTHS = (256, 512, 1024)
KEYS, VALUES, SIZE = 16, 32, 128
HEADS, WIDTH, STATE = 48, 64, 128
KINDS = ("chunks", "loop", "mamba chunks", "mamba mlx-lm")

Function = Callable[..., mx.array]
Arrays = tuple[mx.array, ...]


def gated_delta_net(kind: str, tokens: int) -> tuple[Function, Arrays]:
    """The layer over chunks, or mlx-lm's loop, and its inputs."""
    from mlx_lm.models.gated_delta import gated_delta_ops

    q, k = (mx.random.normal((1, tokens, KEYS, SIZE)) / SIZE**0.5 for _ in "qk")
    v = mx.random.normal((1, tokens, VALUES, SIZE))
    log_g = -mx.random.uniform(0, 1, (1, tokens, VALUES))
    beta = mx.sigmoid(mx.random.normal((1, tokens, VALUES)))
    state = mx.zeros((1, VALUES, SIZE, SIZE))

    def loop(*given: mx.array) -> mx.array:
        q, k, v, log_g, beta = given
        return gated_delta_ops(q, k, v, mx.exp(log_g), beta, state)[0]

    def chunks(*given: mx.array) -> mx.array:
        return gated_delta(*given, state)[0]

    return loop if kind == "loop" else chunks, (q, k, v, log_g, beta)


def mamba(kind: str, tokens: int) -> tuple[Function, Arrays]:
    """Mamba 2 over chunks, or as mlx-lm computes it, and its inputs."""
    from mlx_lm.models import ssm

    x = mx.random.normal((1, tokens, HEADS, WIDTH))
    b, c = (mx.random.normal((1, tokens, 1, STATE)) / STATE**0.5 for _ in "bc")
    dt = mx.random.normal((1, tokens, HEADS))
    a_log, d, bias = mx.zeros((HEADS,)), mx.ones((HEADS,)), mx.zeros((HEADS,))
    state = mx.random.normal((1, HEADS, WIDTH, STATE))
    update = ssm_update if kind == "mamba chunks" else ssm.ssm_update

    def function(*given: mx.array) -> mx.array:
        x, b, c, dt = given
        return update(x, a_log, b, c, d, dt, bias, state)[0]

    return function, (x, b, c, dt)


def measure(kind: str, tokens: int) -> dict[str, Any]:
    """Peak bytes and seconds of one gradient of a sum."""
    function, given = (mamba if "mamba" in kind else gated_delta_net)(kind, tokens)
    mx.eval(given)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(mx.grad(lambda *given: function(*given).sum(), argnums=range(len(given)))(*given))
    return {
        "kind": kind,
        "tokens": tokens,
        "peak_bytes": mx.get_peak_memory() - before,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Measure both at every length, in turn."""
    found = []
    for tokens in LENGTHS:
        for kind in KINDS:
            command = [sys.executable, __file__, kind, str(tokens)]
            told = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(told.stdout))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
